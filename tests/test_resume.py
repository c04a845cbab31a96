"""Resuming a run: more epochs, moved images, kills, lost files.

All in this process; `test_end_to_end.py` and `test_survival.py` kill real ones.
"""

import os
import shutil
import types

import pytest
import tensorflow as tf

import clsa_tf.config
from clsa_tf import train
from clsa_tf.errors import UserError
from clsa_tf.optimizers.schedule import make_schedule
from clsa_tf.training import metrics_log
from clsa_tf.training import run as run_lib
from clsa_tf.training.checkpoint import Checkpoints, load_trained
from tests import tiny
from tests.runs import (
    assert_equal_states,
    leave_out_pictures,
    lines,
    saved,
    states,
)

# Two plain views, which compile faster than those of CLSA.
FLAGS = [
    "--method=moco",
    "--backbone=resnet18",
    "--width=0.125",
    "--projection_size=16",
    "--key_crop=24:0.3:1",
    "--query_crops=24:0.3:1",
    "--queue_size=40",
    "--batch_size=16",
    "--image_size=32",
]


def run(photos, workdir, total_epochs, *, knn_epochs=0):
    leave_out_pictures(workdir)
    config = clsa_tf.config.parse(
        [
            *FLAGS,
            f"--dataset=folder:{photos}",
            f"--workdir={workdir}",
            f"--total_epochs={total_epochs}",
            "--log_steps=1",
            "--checkpoint_steps=1",
            "--keep_checkpoints=99",
            f"--knn_epochs={knn_epochs}",
            "--knn_k=5",
        ]
    )
    train.run(config)
    return config


def evaluated(workdir):
    """Returns the epochs after which a kNN accuracy is logged."""
    return [entry["epoch"] for entry in lines(workdir) if "knn" in entry]


def forget(workdir, step):
    """Removes the checkpoints after `step`, as if killed before them."""
    for path in (workdir / "checkpoints").glob("step-*"):
        if int(path.name.split(".")[0].split("-")[1]) > step:
            path.unlink()


def logged_to_tensorboard(workdir, name="loss"):
    """Returns the steps of all events called `name`, in order of the files."""
    steps = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            tags = [value.tag for value in event.summary.value]
            steps += [event.step] if name in tags else []
    return steps


@pytest.mark.slow
def test_a_run_resumes_with_more_epochs_and_moved_images(
    photos, tmp_path, capsys
):
    """Two epochs of 3 steps, then four, without and with a kill."""
    workdir = tmp_path / "run"
    photos = shutil.copytree(photos, tmp_path / "photos")
    (photos / "dark" / "000.jpg").write_bytes(b"no image")  # trained on
    run(photos, workdir, 2, knn_epochs=3)
    assert evaluated(workdir) == [2]
    moved = photos.rename(tmp_path / "moved")
    capsys.readouterr()
    config = run(moved, workdir, 4, knn_epochs=3)
    # After every third epoch, and at the end of a run.
    assert evaluated(workdir) == [2, 3, 4]
    printed = capsys.readouterr().out
    assert "1 unreadable image was left out" in printed
    assert "resuming" in printed and "at step 6 of 12" in printed
    assert f"--dataset=folder:{moved} instead of folder:{photos}" in printed

    # From step 6 on, the rates follow the schedule of four epochs, as printed.
    schedule = make_schedule(config, 3)
    rates = [entry["lr"] for entry in lines(workdir) if "lr" in entry]
    assert rates[6:] == pytest.approx(
        [float(schedule(s)) for s in range(6, 12)]
    )
    assert rates[5] != pytest.approx(float(schedule(5)))
    for rate in rates[5:7]:
        assert f"{rate:.4g}" in printed

    # As if it had been killed at step 8, having logged further steps.
    again = shutil.copytree(workdir, tmp_path / "again")
    forget(again, 8)
    assert logged_to_tensorboard(again) == list(range(1, 13))
    run(moved, again, 4, knn_epochs=3)
    assert_equal_states(states(again)[:4], states(workdir)[:4])
    assert lines(again) == lines(workdir)
    assert logged_to_tensorboard(again) == list(range(1, 13))


def test_fewer_epochs_need_their_checkpoints():
    claimed_run = types.SimpleNamespace(
        _config=types.SimpleNamespace(total_epochs=3, workdir="run"),
        _claim=types.SimpleNamespace(shorter=True),
        _steps_per_epoch=3,
    )
    run_lib._Run._check_still_complete(claimed_run, 9)
    with pytest.raises(UserError, match="Expected at least 9 .* received 8"):
        run_lib._Run._check_still_complete(claimed_run, 8)


def test_segments_of_a_run_that_is_longer_than_requested():
    assert run_lib.fit_segments(5, 3, 1) == []
    assert run_lib.fit_segments(5, 3, 2) == [(5, 1, 2, 1)]


# ---- Missing checkpoints


@pytest.fixture(scope="module")
def config():
    return tiny.config("clsa", backbone="resnet18")  # valid for --backbone


@pytest.fixture(scope="module")
def method(config):
    return tiny.make(config)


@pytest.fixture
def begun(config, tmp_path):
    """The directory of a run before its first checkpoint."""
    (tmp_path / "run.flags").write_text(clsa_tf.config.to_flagfile(config))
    (tmp_path / "dataset.json").write_text('{"images": 70}')
    metrics_log.append(str(tmp_path), {"step": 4, "epoch": 1.0, "loss": 1.0})
    return tmp_path


def restore(method, workdir):
    return Checkpoints(method, str(workdir), keep=2).restore()


def save(method, workdir):
    method.steps_taken.assign(4)
    Checkpoints(method, str(workdir), keep=2).save()


def test_a_run_that_saved_nothing_starts_again(method, begun):
    assert restore(method, begun) == 0
    with pytest.raises(UserError) as error:
        load_trained(str(begun))
    message = str(error.value)
    assert "not written any yet" in message
    assert "after the first epoch, 4 steps" in message
    assert f"--flagfile={begun}/run.flags" in message


@pytest.mark.parametrize("left", ["data", "metrics", "evaluation"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_again(
    method, begun, left
):
    save(method, begun)
    assert saved(begun, 4)
    if left == "data":
        (begun / "checkpoints" / "step-4.index").unlink()
    else:
        shutil.rmtree(begun / "checkpoints")
        entry = {"metrics": {"step": 5, "epoch": 1.25, "loss": 1.0}}
        other = {"step": 4, "epoch": 1.0, "knn": 0.5}
        metrics_log.append(str(begun), entry.get(left, other))
    for action in (
        lambda: restore(method, begun),
        lambda: load_trained(str(begun)),
    ):
        with pytest.raises(UserError) as error:
            action()
        message = str(error.value)
        assert str(begun) in message and "backup" in message
        assert ("step-4.data" in message) == (left == "data")


def test_a_kill_while_the_first_checkpoint_is_moved_is_harmless(method, begun):
    save(method, begun)
    folder = begun / "checkpoints"
    (folder / "unfinished").mkdir()
    os.rename(folder / "step-4.index", folder / "unfinished" / "step-4.index")
    assert restore(method, begun) == 0
    # Nothing is left that looks like a lost checkpoint after another kill.
    assert list(folder.iterdir()) == []
    assert restore(method, begun) == 0


# ---- TensorBoard


def write_events(workdir, steps):
    writer = tf.summary.create_file_writer(str(workdir / "tensorboard"))
    with writer.as_default():
        for step in steps:
            tf.summary.scalar("loss", 0.5, step)
    writer.close()


def test_rewind_removes_later_events_of_tensorboard(tmp_path):
    write_events(tmp_path, range(1, 8))
    (path,) = (tmp_path / "tensorboard").iterdir()
    # A kill cut the last record short.
    path.write_bytes(path.read_bytes()[:-5])
    untouched = path.read_bytes()
    metrics_log.rewind(str(tmp_path), 6)
    assert path.read_bytes() == untouched
    metrics_log.rewind(str(tmp_path), 4)
    assert logged_to_tensorboard(tmp_path) == [1, 2, 3, 4]
    write_events(tmp_path, range(5, 8))
    assert logged_to_tensorboard(tmp_path) == list(range(1, 8))
    metrics_log.rewind(str(tmp_path), 4)
    assert [p.name for p in (tmp_path / "tensorboard").iterdir()] == [path.name]
    metrics_log.rewind(str(tmp_path), 0)
    assert not list((tmp_path / "tensorboard").iterdir())


def test_tensorboard_reads_each_step_once(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    write_events(tmp_path, range(1, 8))
    metrics_log.rewind(str(tmp_path), 4)
    write_events(tmp_path, range(5, 10))
    found = event_accumulator.EventAccumulator(
        str(tmp_path / "tensorboard"), purge_orphaned_data=False
    ).Reload()
    assert [e.step for e in found.Tensors("loss")] == list(range(1, 10))
