"""Runs survive kills, signals, full disks and damaged data."""

import functools
import os
import signal
import subprocess

import h5py
import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.errors import UserError, is_of_disk
from clsa_tf.training import metrics_log
from clsa_tf.training.callbacks import Log
from clsa_tf.training.checkpoint import Checkpoints
from export import formats, savedmodel
from tests import tiny
from tests.photos import write_folder
from tests.runs import (
    assert_equal_states,
    call,
    command,
    lines,
    saved,
    start,
    states,
    train,
    wait_until,
)

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="root mounts a disk")


def assert_one_sentence(stderr, *words):
    """Checks that there is one error line, with these words."""
    assert "Traceback" not in stderr
    (sentence,) = [s for s in stderr.split("\n") if s.startswith("error: ")]
    for word in words:
        assert word in sentence, sentence


def steps(workdir):
    """Reads all checkpoints; returns their steps, newest first."""
    return [int(name[len("step-") :]) for name, _ in states(workdir)]


def assert_ends_as(workdir, other):
    assert_equal_states(states(workdir)[:1], states(other)[:1])
    assert lines(workdir) == lines(other)


class Paused:
    """Starts a run, and stops its process when a condition holds.

    The process continues at the end of the `with` statement.
    """

    def __init__(self, arguments, condition, output=subprocess.DEVNULL):
        self.process = start(arguments, output)
        assert wait_until(condition, self.process, pause=0.001)
        self.process.send_signal(signal.SIGSTOP)

    def __enter__(self):
        return self.process

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def output(tmp_path):
    with open(tmp_path / "output", "w+") as file:
        yield file


def text_of(output):
    output.seek(0)
    return output.read()


def is_begun(workdir):
    """Condition: seconds before the first step."""
    return lambda: (workdir / "tensorboard").exists()


def is_training(workdir):
    """Condition: two steps are done and not in a checkpoint."""
    return lambda: metrics_log.read(workdir) != []


# ---- Kills and signals


@pytest.mark.slow
def test_a_run_that_is_killed_repeatedly_resumes_exactly():
    result = call(command("tests.kill", "--kills=6", "--seed=0"))
    assert "Equal to the undisturbed run." in result.stdout


@pytest.mark.slow
def test_a_run_that_gets_signals_resumes_exactly(
    photos, finished, tmp_path, output
):
    workdir = tmp_path / "run"
    arguments = train(photos, workdir)
    with Paused(arguments, is_begun(workdir), output) as process:
        rejected = call(arguments, status=1)
        assert_one_sentence(rejected.stderr, f"process {process.pid} on")
        # No step has been trained yet, and the first one takes a while.
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130
    printed = text_of(output)
    assert "SIGINT: stopped before the first step" in printed
    assert "Traceback" not in printed
    assert steps(workdir) == []

    with Paused(arguments, is_training(workdir), output) as process:
        process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    printed = text_of(output)
    assert "SIGTERM: finishing the step and saving" in printed
    assert "Stopped by SIGTERM and saved" in printed
    assert f"--workdir={workdir}" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    # Saved because of the signal.
    (first,) = steps(workdir)
    assert first in (2, 3)

    # After the checkpoint of an epoch comes its evaluation.
    with Paused(arguments, lambda: saved(workdir, 6), output) as process:
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert f"at step {first} of 9" in text_of(output)
    assert steps(workdir) == sorted({6, 3, first}, reverse=True)
    assert [e["step"] for e in metrics_log.read(workdir) if "knn" in e] == [3]

    assert "at step 6 of 9" in call(arguments).stdout
    assert_ends_as(workdir, finished[0])
    # Once more: nothing is left to do; the next commands are the same.
    again = call(arguments).stdout
    assert "is complete" in again and "trained for 3 epochs, 9 steps" in again
    assert f"-m clsa_tf.report --workdir={workdir}" in again
    assert_ends_as(workdir, finished[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["split", "sync"])
def test_a_run_resumes_with_another_number_of_replicas(case, photos, tmp_path):
    def resized(workdir, replicas):
        return command("tests.resized", case, photos, workdir, replicas)

    straight = tmp_path / "straight"
    call(resized(straight, 1))
    for before, after in ((2, 1), (1, 2)):
        workdir = tmp_path / f"{before} to {after}"
        with Paused(resized(workdir, before), is_begun(workdir)) as process:
            process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
        assert steps(workdir) == [1]
        call(resized(workdir, after))
        assert_close(workdir, straight)


def assert_close(workdir, straight):
    """Compares up to rounding, because sums are in another order."""
    for (_, mine), (_, other) in zip(states(workdir), states(straight)):
        assert mine.keys() == other.keys() and len(mine) > 50
        for name, value in mine.items():
            # Relative to the largest number of each variable.
            largest = np.max(np.abs(other[name]), initial=0)
            np.testing.assert_allclose(
                value, other[name], rtol=0, atol=1e-5 * largest, err_msg=name
            )
    assert len(lines(workdir)) == len(lines(straight)) == 6
    for mine, other in zip(lines(workdir), lines(straight)):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


# ---- Storage


@pytest.fixture
def disk(tmp_path):
    """A directory on a disk of 6 MB, which holds two checkpoints."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=6m", "tmpfs", path)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True)


def fill(disk):
    """Fills a disk; returns the file that does."""
    path = disk / "filler"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


@pytest.mark.slow
@needs_root
def test_a_run_resumes_after_a_full_disk(photos, finished, disk):
    workdir = disk / "run"
    arguments = train(photos, workdir, "--checkpoint_steps=1")
    error = call(arguments, status=1).stderr
    assert_one_sentence(
        error, "checkpoint of step 3", "step-2: make room", "No space left"
    )
    assert steps(workdir) == [2, 1]
    assert [entry["step"] for entry in lines(workdir)] == [2]
    # Incomplete files do not take up space.
    left = os.listdir(workdir / "checkpoints")
    assert len(left) == 4 and all(name.startswith("step-") for name in left)

    filler = fill(disk)
    error = call(arguments, status=1).stderr
    assert_one_sentence(error, "No space left", "make room")
    assert steps(workdir) == [2, 1]

    filler.unlink()
    mount("-o", "remount,size=32m", disk)
    assert "at step 2 of 9" in call(arguments).stdout
    assert_equal_states(states(workdir), states(finished[0]))
    assert lines(workdir) == lines(finished[0])


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize(
    "room, export",
    [
        (100_000, lambda run, out: savedmodel.export(run, out)),
        (0, lambda run, out: savedmodel.export(run, out)),
        *(
            (100_000, functools.partial(formats.export, formats=[name]))
            for name in ("keras", "weights")
        ),
    ],
    ids=["savedmodel", "no room at all", "keras", "weights"],
)
def test_an_export_to_a_full_disk_leaves_no_files(exported, disk, room, export):
    filler = fill(disk)
    os.truncate(filler, filler.stat().st_size - room)
    with pytest.raises(Exception) as error:
        export(str(exported.workdir), str(disk / "out"))
    assert is_of_disk(error.value), repr(error.value)
    # A file that HDF5 cannot close would crash the process later.
    assert h5py.h5f.get_obj_count(types=h5py.h5f.OBJ_FILE) == 0
    # (Without any space, even the directory is missing.)
    assert not room or os.listdir(disk / "out") == []


def log_in(workdir):
    config = tiny.config(workdir=str(workdir))
    workdir.mkdir()
    return Log(
        config,
        4,
        steps_per_epoch=2,
        schedule=lambda step: 0.1,
        checkpoints=Checkpoints(tiny.make(config), str(workdir), keep=1),
        watch=None,
    )


def test_a_full_disk_for_metrics_is_an_error(tmp_path):
    log = log_in(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left.*no checkpoint yet"):
        log.write({"loss": 1.0})


@needs_root
def test_a_full_disk_for_tensorboard_is_an_error(tmp_path, disk):
    log = log_in(disk / "run")
    (disk / "run" / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    fill(disk)
    # (TensorFlow states the cause and the failed action in different lines.)
    words = "(No space left|Failed to flush).*no checkpoint yet"
    with pytest.raises(UserError, match=words):
        for _ in range(100):  # its last block has a little space
            log.write({"loss": 1.0})


@pytest.mark.slow
@needs_root
def test_a_run_resumes_after_a_disk_too_full_for_its_metrics_and_pictures(
    photos, finished, disk, output
):
    workdir = disk / "run"
    arguments = train(photos, workdir, draw=True)
    # First `views.png` has no space, then a line of metrics or TensorBoard.
    for _ in range(2):
        with Paused(arguments, is_begun(workdir), output) as process:
            filler = fill(disk)
        assert process.wait() == 1
        filler.unlink()
        assert_one_sentence(text_of(output), "No space left", "make room")
        output.truncate(0)
        if not (workdir / "views.png").exists():
            with Paused(
                arguments, (workdir / "views.png").exists, output
            ) as process:
                process.kill()
            process.wait()
    mount("-o", "remount,size=32m", disk)
    call(arguments)
    assert_ends_as(workdir, finished[0])


@pytest.fixture
def read_only(finished, tmp_path):
    """The directory of the finished run, without permission to write."""
    if os.getuid():
        finished[0].chmod(0o555)
        yield finished[0]
        finished[0].chmod(0o755)
        return
    path = tmp_path / "read_only"
    path.mkdir()
    mount("--bind", finished[0], path)
    mount("-o", "remount,bind,ro", path)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.slow
def test_a_read_only_directory_is_rejected(photos, finished, read_only):
    before = (read_only / "metrics.jsonl").read_bytes()
    error = call(train(photos, read_only), status=1).stderr
    assert_one_sentence(error, "--workdir that can be written")
    assert steps(read_only) == [9, 8, 7]
    assert (read_only / "metrics.jsonl").read_bytes() == before


# ---- Numbers


@pytest.mark.slow
def test_numbers_that_are_not_finite_end_the_run_and_are_not_saved(
    photos, tmp_path
):
    workdir = tmp_path / "run"
    error = call(
        train(
            photos, workdir, "--base_lr=1e9", "--checkpoint_steps=1",
            "--keep_checkpoints=9",
        ),
        status=1,
    ).stderr  # fmt: skip
    found = states(workdir)
    for _, variables in found:
        for name, value in variables.items():
            assert np.all(np.isfinite(value)), name
    assert all(np.isfinite(line["loss"]) for line in lines(workdir))
    # The step after the last saved one, with its learning rate.
    step = steps(workdir)[0] + 1
    assert_one_sentence(error, f"step {step} with learning rate", "e+07")
    assert f"checkpoint is {workdir}/checkpoints/{found[0][0]}: lower" in error


# ---- Data


def write_photos(folder):
    """Writes 1,000 photographs, ten damaged; returns the unreadable ones."""
    write_folder(folder, classes=("",), each=1000)
    rng = np.random.default_rng(0)
    unreadable = set()
    for i in range(10):
        path = folder / f"{i:03d}.jpg"
        data = bytearray(path.read_bytes())
        if i < 4:
            data = data[: rng.integers(len(data))]  # cut short
        else:
            for place in rng.integers(len(data), size=20):
                data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            tf.io.decode_jpeg(bytes(data), channels=3)
        except tf.errors.InvalidArgumentError:
            unreadable.add(str(path))
    assert 4 < len(unreadable)  # some with changed bytes, too
    return unreadable


EVERY_PHOTO = ["--batch_size=20", "--log_steps=1"]


@pytest.mark.slow
def test_damaged_photographs_are_counted_and_named(tmp_path):
    photos = tmp_path / "photos"
    unreadable = write_photos(photos)
    # Each is read twice, and counted once.
    result = call(
        train(photos, tmp_path / "run", *EVERY_PHOTO, "--total_epochs=2")
    )
    for path in unreadable:
        assert result.stderr.count(path) == 1
    assert f"{len(unreadable)} unreadable images were left" in result.stdout


@pytest.mark.slow
def test_too_many_damaged_photographs_end_the_run(tmp_path):
    photos = tmp_path / "photos"
    write_photos(photos)
    error = call(
        train(photos, tmp_path / "few", *EVERY_PHOTO, "--max_bad_share=0.001"),
        status=1,
    ).stderr
    assert_one_sentence(error, "at most 0.1% unreadable images", "received 2")


@pytest.mark.slow
def test_photographs_deleted_during_the_run_are_counted(tmp_path, output):
    photos, workdir = tmp_path / "photos", tmp_path / "run"
    write_folder(photos, classes=("",), each=1000)
    gone = [photos / f"{i:03d}.jpg" for i in range(40)]
    arguments = train(photos, workdir, *EVERY_PHOTO, "--total_epochs=3")
    with Paused(arguments, lambda: lines(workdir), output) as process:
        for path in gone[:30]:
            path.unlink()
        for path in gone[30:]:
            path.write_bytes(b"\xff\xd8 not a photograph any more")
    assert process.wait() == 0
    printed = text_of(output)
    assert "40 unreadable images were left out" in printed
    assert sum(str(path) in printed for path in gone) == 10
    assert "Further unreadable images are only counted" in printed
    assert lines(workdir)[-1]["step"] == 150
