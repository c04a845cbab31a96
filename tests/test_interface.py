"""Each part of a method's interface, through `train.run` (`tests/toy.py`)."""

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from clsa_tf import train
from clsa_tf.data.open import open_train_source
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.distributed import collectives
from clsa_tf.errors import Stopped, UserError
from clsa_tf.evaluation.dataset_features import DatasetFeatures
from clsa_tf.options.fields import AUTO
from clsa_tf.plots import curves
from clsa_tf.training import announcement, config_checks, metrics_log, summary
from tests import cluster, runs, tiny, toy
from tests.photos import write_folder
from tests.test_data_service import record
from tests.test_distribution import assert_same_state, state, train_all


@pytest.fixture(autouse=True)
def registered(toy_method):
    toy_method.EPOCHS.clear()


def config(workdir, data, **changes):
    runs.leave_out_pictures(workdir)
    settings = dict(
        backbone="one_block",
        dataset=data,
        holdout=0.0,
        workdir=str(workdir),
        batch_norm="split",
        batch_norm_splits=4,
        total_epochs=2,
        log_steps=1,
        checkpoint_steps=1,
        keep_checkpoints=9,
        knn_epochs=0,
        image_size=16,
        l2=0.0,  # would move frozen prototypes
        frozen_steps=AUTO,
    )
    return tiny.config("toy", **settings | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return f"folder:{write_folder(tmp_path_factory.mktemp('toy'))}"


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    toy.register()
    workdir = tmp_path_factory.mktemp("toys") / "straight"
    method = train.run(config(workdir, folder))
    return workdir, method, list(toy.EPOCHS)


@pytest.mark.slow
def test_every_part_of_the_interface_is_used(straight):
    workdir, method, epochs = straight
    assert epochs == [0, 1]
    initial = toy.METHOD(method.config, method.run)
    # 2 epochs of 3 batches of 16 of 60 images: rows of the bank by their index.
    changed = np.any(method.bank.numpy() != initial.bank.numpy(), axis=1)
    assert 48 <= changed.sum() <= 60
    assert np.any(method.prototypes.numpy() != initial.prototypes.numpy())
    assert np.any(method.means.numpy())
    frozen = tf.train.load_checkpoint(f"{workdir}/checkpoints/step-2")
    (name,) = [
        name
        for name in frozen.get_variable_to_shape_map()
        if "prototypes" in name and "optimizer" not in name
    ]
    np.testing.assert_array_equal(
        frozen.get_tensor(name), initial.prototypes.numpy()
    )


@pytest.mark.slow
def test_resuming_within_an_epoch_is_exact(straight, folder, tmp_path):
    """There is no other pass over the data, which would use newer weights."""
    toy.EPOCHS.clear()
    workdir = tmp_path / "run"
    shutil.copytree(straight[0], workdir)
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name.split(".")[0].removeprefix("step-")) > 4:
            path.unlink()
    train.run(config(workdir, folder))
    assert toy.EPOCHS == []
    assert_same_run(workdir, straight[0])


def assert_same_run(workdir, straight):
    """The same last state and the same metrics."""
    (mine, one), (name, other) = map(runs.final_state, (workdir, straight))
    assert mine == name and one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    assert runs.lines(workdir) == runs.lines(straight)


@pytest.mark.slow
def test_a_run_stopped_before_an_epoch_resumes_exactly(
    straight, folder, tmp_path, monkeypatch
):
    """At once; the next start repeats it with the same weights."""
    before = toy.METHOD.on_epoch_begin

    def interrupted(self, epoch, features):
        before(self, epoch, features)
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(toy.METHOD, "on_epoch_begin", interrupted)
        train.run(config(workdir, folder))
    assert runs.final_state(workdir)[0] == "step-3"
    train.run(config(workdir, folder))
    assert toy.EPOCHS == [0, 1, 1]
    assert_same_run(workdir, straight[0])


@pytest.mark.slow
def test_a_job_stopped_before_an_epoch_resumes_there(folder, tmp_path):
    """A signal to one of two workers stops both in the pass over the data."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    runs.leave_out_pictures(workdir)

    def start(seconds):
        photos = folder.partition(":")[2]
        command = ["tests.paused_epoch", photos, workdir, seconds]
        return cluster.start(command, workers=2, log=log)

    def printed():
        return pathlib.Path(f"{log}.1").read_text()

    processes = start(3)
    assert runs.wait_until(lambda: "epoch 1" in printed(), processes[1])
    processes[1].send_signal(signal.SIGTERM)
    assert cluster.wait(processes, timeout=120) == [143, 143]
    assert runs.final_state(workdir)[0] == "step-3"

    assert cluster.wait(start(0), timeout=300) == [0, 0]
    assert "epoch 1" in printed() and "epoch 0" not in printed()
    assert runs.final_state(workdir)[0] == "step-6"


@pytest.fixture(scope="module")
def features(folder):
    """Features of all images, and the function that may stop a pass."""
    config_ = tiny.config("simclr", dataset=folder, image_size=16)
    asked = mock.Mock(return_value=0)
    return asked, DatasetFeatures(
        tiny.make(config_),
        open_train_source(config_),
        tf.distribute.get_strategy(),
        UnreadableImages(max_bad_share=0.0),
        stop_signal=asked,
    )


def test_features_are_traced_once(features, monkeypatch):
    traced = mock.Mock(side_effect=collectives.gather)
    monkeypatch.setattr(collectives, "gather", traced)
    method = features[1]._method
    first = features[1].once()()
    traced.reset_mock()
    for variable in method.encoder.trainable_variables:
        variable.assign(1.1 * variable)
    assert not np.allclose(features[1].once()(), first)  # newer weights
    assert traced.call_count == 0


def test_a_pass_over_the_dataset_is_stopped(features):
    asked, dataset_features = features
    asked.return_value = signal.SIGTERM
    with pytest.raises(Stopped) as stopped:
        dataset_features.once()()
    assert stopped.value.signal == signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_accumulation_equals_the_whole_batch(whole, straight, folder, tmp_path):
    """Outputs, loss variables and gradients of micro-batches."""
    method = train.run(
        config(tmp_path / "run", folder, accumulation_steps=2, as_a_whole=whole)
    )
    for mine, other in zip(method.learned, straight[1].learned):
        np.testing.assert_allclose(mine, other, atol=1e-4)
    np.testing.assert_allclose(method.bank, straight[1].bank, atol=1e-3)


@pytest.mark.slow
def test_two_replicas_equal_one(straight, folder, tmp_path):
    photos = folder.partition(":")[2]
    found = train_all(["toy:split:run"], ("1", "2"), photos, tmp_path)
    one, two = (found[name][0] / "toy" / "split" for name in ("1", "2"))
    for step in (1, 4, 6):
        assert_same_state(state(two, step), state(one, step))
    for mine, other in zip(runs.lines(two), runs.lines(one)):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tfrecord", "tfds"])
def test_record_files_and_tfds_have_indices(kind, folder, tmp_path):
    """Small record files are read into memory, which gives indices."""
    root = pathlib.Path(folder.partition(":")[2])
    files = sorted(root.rglob("*.jpg"))
    labels = [int(path.parent.name == "dark") for path in files]
    if kind == "tfrecord":
        with tf.io.TFRecordWriter(str(tmp_path / "r.tfrecord")) as writer:
            for path, label in zip(files, labels):
                writer.write(record(path.read_bytes(), label))
        data = f"tfrecord:{tmp_path}/r.tfrecord"
    else:
        data = prepared(tmp_path, files, labels)
    method = train.run(config(tmp_path / "run", data, total_epochs=1))
    assert toy.EPOCHS == [0]
    assert method.run.num_images == 60 and method.run.num_classes == 2
    initial = toy.METHOD(method.config, method.run)
    changed = np.any(method.bank.numpy() != initial.bank.numpy(), axis=1)
    assert changed.sum() == 48


def prepared(folder, files, labels):
    """Prepares a dataset of tensorflow-datasets; returns its directory."""

    class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "photos"

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "label": tfds.features.ClassLabel(num_classes=2),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (path, label) in enumerate(zip(files, labels)):
                yield i, {"image": str(path), "label": label}

    builder = Photos(data_dir=str(folder / "tfds"))
    builder.download_and_prepare()
    return str(builder.data_dir)


def test_an_unknown_level_is_not_shown(folder, tmp_path, capsys):
    config_ = config(tmp_path / "run", folder, frozen_steps=2)
    announcement.announce(
        config_,
        source=open_train_source(config_),
        evaluation=None,
        claim=mock.Mock(notes=[], changes=[]),
        step=0,
        steps_per_epoch=3,
        replicas=1,
        chosen=[],
        taken=[],
        remote=False,
        accelerated=True,
    )
    entry = {"step": 6, "epoch": 2.0, "loss": 1.5}
    metrics_log.append(config_.workdir, entry)
    print(summary.of_run(config_, step=6, steps_per_epoch=3, seconds=9.0))
    printed = capsys.readouterr().out
    assert "1.500 nats\n" in printed and "chance" not in printed
    picture = str(tmp_path / "curves.png")
    curves.curves(
        [entry], picture, title="", chance_loss=None, unit="", baselines={}
    )
    assert os.path.exists(picture)


def test_sources_without_indices_or_labels_are_rejected(folder, tmp_path):
    config_ = config(tmp_path / "run", folder)
    source = open_train_source(config_)
    config_checks.check_needs(config_, source)
    with pytest.raises(UserError, match="--method=toy"):
        config_checks.check_needs(
            config_, dataclasses.replace(source, random_access=False)
        )
    with pytest.raises(UserError, match="labels"):
        config_checks.check_needs(
            config_, dataclasses.replace(source, class_names=None)
        )


@pytest.mark.slow
def test_a_method_is_one_file_and_one_flagfile(tmp_path):
    """A copy of the library with two more files passes the methods' tests."""
    folders = "clsa_tf export configs docs examples tests benchmarks"
    for name in folders.split():
        shutil.copytree(
            name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(name, tmp_path / name)
    text = pathlib.Path("clsa_tf/methods/simclr.py").read_text()
    text = text.replace("SimCLR", "Added")
    (tmp_path / "clsa_tf" / "methods" / "added.py").write_text(text)
    flags = pathlib.Path("configs/simclr.flags").read_text()
    # Method, directory, and the command in the first comment.
    for setting in ("--method=", "--workdir=runs/", "configs/"):
        flags = flags.replace(f"{setting}simclr", f"{setting}added")
    (tmp_path / "configs" / "added.flags").write_text(flags)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow"]
        + ["-k", "added", "tests/test_methods.py", "tests/test_config.py"]
        + ["tests/test_help.py", "tests/test_auto.py"]
        + ["tests/test_conventions.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    assert re.search(r"\b\d\d+ passed", result.stdout), result.stdout[-500:]
