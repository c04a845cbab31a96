"""Settings that `train.run` rejects; test_end_to_end.py tests the rest."""

import contextlib
import os
from unittest import mock

import pytest

import clsa_tf.config
from clsa_tf import train
from clsa_tf.errors import UserError
from clsa_tf.training import run as run_lib
from clsa_tf.training import workdir
from tests import tiny
from tests.photos import TINY_FLAGS, write_folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photos"))


def run(*arguments):
    return train.run(clsa_tf.config.parse([*TINY_FLAGS, *arguments]))


@pytest.mark.parametrize(
    "flags_, words",
    [
        (["--dataset=folder:{}/none"], ["none", "folder"]),
        (["--dataset=folder:{empty}"], ["empty"]),
        (["--batch_size=64", "--queue_size=99"], ["52 images", "--batch_size"]),
        (["--key_crop=200:0.2:1"], ["200 px", "--allow_upscaling"]),
        (["--strategy=mirrored"], ["GPU", "--strategy"]),
        (["--dataset=no_such_data"], ["no_such_data"]),
        (["--dataset=imagenet2012"], ["imagenet2012", "data_dir"]),
    ],
)
def test_wrong_settings_are_rejected(photos, tmp_path, flags_, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    arguments = [
        f"--dataset=folder:{photos}",
        f"--workdir={tmp_path}/run",
        f"--data_dir={tmp_path}/data",
        *(f.format(photos, empty=tmp_path / "empty") for f in flags_),
    ]
    with pytest.raises(UserError) as error:
        run(*arguments)
    message = str(error.value)
    assert message.startswith("Expected") and "received" in message
    for word in words:
        assert word in message, message


def test_other_images_in_the_same_workdir_are_rejected(tmp_path):
    config = tiny.config(workdir=str(tmp_path / "run"))
    for _ in range(2):  # it is released, and may be claimed again
        with workdir.claim(config, images=54):
            pass
    with pytest.raises(UserError, match="the 54 images that .* received 55"):
        workdir.claim(config, images=55)
    for text in ("", "54", "{}", "{"):
        (tmp_path / "run" / "dataset.json").write_text(text)
        with pytest.raises(UserError, match="dataset.json, received something"):
            workdir.claim(config, images=54)


def test_an_unwritable_workdir_is_rejected(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir that can be written"):
        run(f"--dataset=folder:{photos}", f"--workdir={tmp_path}/file/run")


def test_a_picture_that_cannot_be_drawn_closes_the_log(
    photos, tmp_path, monkeypatch
):
    closed = mock.Mock()
    monkeypatch.setattr(run_lib.Log, "close", closed)
    full = mock.Mock(side_effect=UserError("the disk is full"))
    monkeypatch.setattr(run_lib._Run, "_draw_views", full)
    data, place = f"folder:{photos}", str(tmp_path / "run")
    config = tiny.config("simclr", dataset=data, workdir=place, image_size=16)
    with pytest.raises(UserError, match="the disk is full"):
        train.run(config)
    assert closed.called


def test_the_picture_of_the_views_needs_no_data_service(
    photos, tmp_path, monkeypatch
):
    """It shows the images in their order, which services may change."""
    monkeypatch.setattr(run_lib.Services, "check", lambda self: None)
    config = tiny.config(
        "simclr",
        dataset=f"folder:{photos}",
        workdir=str(tmp_path / "run"),
        image_size=16,
        data_service="grpc://localhost:1",
    )
    job = run_lib._Run(config)
    made = mock.Mock()
    monkeypatch.setattr(run_lib, "training_batches", made)
    for keep_params in (True, False):
        job._batches(0, keep_params=keep_params)
        used = made.call_args.kwargs["services"]
        assert bool(used) != keep_params


@pytest.mark.parametrize("chief", [True, False])
def test_only_the_chief_shows_what_it_does(chief, tmp_path, capsys):
    config = tiny.config(workdir=str(tmp_path / "run"))
    log = run_lib.Log(
        config,
        0,
        steps_per_epoch=1,
        schedule=lambda step: 0.1,
        checkpoints=None,
        watch=None,
        chief=chief,
    )
    with contextlib.closing(log), log.doing("drawing"):
        pass
    assert capsys.readouterr().err == ("drawing …\n" if chief else "")


@pytest.mark.slow
def test_too_many_bad_images_stop_the_run_unless_they_are_allowed(
    photos, tmp_path
):
    mixed = write_folder(tmp_path / "mixed", classes=("",), each=30)
    for i in range(10):
        (mixed / f"bad{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    with pytest.raises(UserError, match="--max_bad_share"):
        run(f"--dataset=folder:{mixed}", f"--workdir={tmp_path}/run")
    # With a larger share it runs.
    run(
        f"--dataset=folder:{mixed}",
        f"--workdir={tmp_path}/run",
        "--max_bad_share=0.5",
        "--total_epochs=3",
    )
    assert os.path.exists(tmp_path / "run" / "checkpoints" / "step-6.index")


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, [(0, 0, 4, 10)]),
        (10, [(10, 1, 4, 10)]),
        (13, [(13, 1, 2, 7), (20, 2, 4, 10)]),
        (37, [(37, 3, 4, 3)]),
        (40, []),
    ],
)
def test_segments_lead_from_the_step_to_the_end(step, expected):
    assert run_lib.fit_segments(step, 10, 4) == expected
