import os
import stat
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf.errors import UserError
from clsa_tf.training.checkpoint import (
    Checkpoints,
    list_checkpoints,
    load_trained,
)
from tests import tiny
from tests.marks import slow_but


@pytest.fixture(scope="module")
def config():
    return tiny.config("clsa", backbone="resnet18")  # valid for --backbone


def step(method):
    """Replaces a training step: changes all variables, counts the step."""
    for variable in method.variables + method.optimizer.variables:
        if variable.dtype.is_floating:
            variable.assign_add(tf.ones_like(variable))
    method.optimizer.iterations.assign_add(1)
    method.steps_taken.assign_add(1)


def trained(config, workdir, saves=3):
    """A run in `workdir` with a checkpoint after each of `saves` steps."""
    method = tiny.make(config)
    checkpoints = Checkpoints(method, str(workdir), keep=5)
    for _ in range(saves):
        step(method)
        checkpoints.save()
    (workdir / "run.flags").write_text(config_lib.to_flagfile(config))
    return method


def damage(workdir, number, how):
    folder = workdir / "checkpoints"
    (data,) = folder.glob(f"step-{number}.data-*")
    index = folder / f"step-{number}.index"
    size = data.stat().st_size
    if how == "cut short":
        os.truncate(data, size // 2)
    elif how == "bit flipped":
        with open(data, "r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)
            file.seek(size // 2)
            file.write(bytes([byte[0] ^ 1]))
    elif how == "index empty":
        index.write_bytes(b"")
    elif how == "data missing":
        data.unlink()


@pytest.mark.parametrize(
    "how",
    slow_but(1, ["bit flipped", "cut short", "index empty", "data missing"]),
)
def test_restore_falls_back_to_the_previous_checkpoint(
    config, tmp_path, caplog, how
):
    trained(config, tmp_path)
    damage(tmp_path, 3, how)
    method = tiny.make(config)
    checkpoints = Checkpoints(method, str(tmp_path), keep=5)
    assert checkpoints.restore() == 2
    assert "step-3" in caplog.text and "falling back" in caplog.text
    # The run continues and replaces the damaged checkpoint.
    step(method)
    checkpoints.save()
    again = tiny.make(config.replace(seed=5))
    assert Checkpoints(again, str(tmp_path), keep=5).restore() == 3
    for a, b in zip(again.variables, method.variables):
        np.testing.assert_array_equal(a, b)


def test_a_full_memory_does_not_count_as_damage(config, tmp_path, monkeypatch):
    trained(config, tmp_path)
    checkpoints = Checkpoints(tiny.make(config), str(tmp_path), keep=5)
    full = tf.errors.ResourceExhaustedError(None, None, "OOM")
    with monkeypatch.context() as patch, pytest.raises(type(full)):
        patch.setattr(tf.train.Checkpoint, "read", mock.Mock(side_effect=full))
        checkpoints.restore()
    assert checkpoints.restore() == 3


def test_a_damaged_state_file_is_ignored(config, tmp_path):
    trained(config, tmp_path, saves=2)
    (tmp_path / "checkpoints" / "checkpoint").write_text("nonsense")
    checkpoints = Checkpoints(tiny.make(config), str(tmp_path), keep=5)
    assert checkpoints.restore() == 2


def test_unreadable_checkpoints_are_an_error_and_no_checkpoint_is_step_zero(
    config, tmp_path
):
    assert Checkpoints(tiny.make(config), str(tmp_path), keep=5).restore() == 0
    trained(config, tmp_path, saves=1)
    damage(tmp_path, 1, "cut short")
    with pytest.raises(UserError, match="1 unreadable"):
        Checkpoints(tiny.make(config), str(tmp_path), keep=5).restore()


def test_only_the_newest_checkpoints_are_kept(config, tmp_path):
    method = tiny.make(config)
    checkpoints = Checkpoints(method, str(tmp_path), keep=2)
    for _ in range(4):
        step(method)
        checkpoints.save()
    found = list_checkpoints(str(tmp_path / "checkpoints"))
    assert [os.path.basename(p) for p in found] == ["step-4", "step-3"]


@pytest.mark.slow
def test_load_trained_restores_the_newest_readable_encoder(config, tmp_path):
    method = trained(config, tmp_path)
    damage(tmp_path, 3, "cut short")
    assert load_trained(str(tmp_path)).step == 2
    trained(config, tmp_path)
    loaded = load_trained(str(tmp_path))
    assert (loaded.config, loaded.step) == (config, 3)
    for a, b in zip(loaded.encoder.variables, method.encoder.variables):
        np.testing.assert_array_equal(a, b)


def test_an_unwritable_directory_is_an_error_with_the_newest_checkpoint(
    config, tmp_path
):
    method = trained(config, tmp_path, saves=1)
    checkpoints = Checkpoints(method, str(tmp_path), keep=5)
    checkpoints.restore()
    step(method)
    folder = tmp_path / "checkpoints"
    # Even root cannot create a file below a regular file.
    folder.rename(tmp_path / "aside")
    folder.write_text("")
    folder.chmod(stat.S_IRUSR)
    with pytest.raises(UserError, match="newest good checkpoint is .*step-1"):
        checkpoints.save()
