"""Training runs as processes, and their results."""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf

from clsa_tf.training import metrics_log
from clsa_tf.training.checkpoint import list_checkpoints
from tests.photos import TINY_FLAGS


def command(module, *arguments):
    return [sys.executable, "-m", module, *map(str, arguments)]


def train(photos, workdir, *extra, draw=False):
    """Returns the command of a small run; `draw` adds the views' picture."""
    if not draw:
        leave_out_pictures(workdir)
    return command(
        "clsa_tf.train",
        *TINY_FLAGS,
        f"--dataset=folder:{photos}",
        f"--workdir={workdir}",
        *extra,
    )


def in_new_process(function, *arguments):
    """Calls a function of a module in a process without TensorFlow so far."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def leave_out_pictures(workdir):
    """Creates an empty picture in advance, which saves a run five seconds."""
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "views.png").exists():
        (workdir / "views.png").touch()


def environment():
    """Returns a user's environment, without a log level of TensorFlow."""
    unset = "TF_CPP_MIN_LOG_LEVEL"
    return {k: v for k, v in os.environ.items() if k != unset}


def call(arguments, status=0, timeout=900):
    """Runs a command to its end; its exit status has to be `status`."""
    result = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=timeout,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result


def assert_only_a_bar(errors):
    """Checks that stderr holds only progress bars, which overwrite a line."""
    for line in errors.splitlines():
        for part in line.split("\r"):
            assert not part.strip() or "%|" in part, part


def start(arguments, output=subprocess.DEVNULL, **variables):
    """Starts a command; its output goes to the file `output`."""
    return subprocess.Popen(
        arguments,
        stdout=output,
        stderr=output,
        env=environment() | variables,
    )


def wait_until(condition, process, *, seconds=600, pause=0.01):
    """Waits while `process` runs; returns whether it still does."""
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        if process.poll() is not None:
            return False
        time.sleep(pause)
    return process.poll() is None


def saved(workdir, step):
    """Whether the checkpoint of `step` exists."""
    return (workdir / "checkpoints" / f"step-{step}.index").exists()


def states(workdir):
    """Returns name and variables of each checkpoint, newest first.

    Variables that depend on the clock are left out.
    """
    found = []
    for path in list_checkpoints(str(workdir / "checkpoints")):
        reader = tf.train.load_checkpoint(path)
        variables = {
            name: reader.get_tensor(name)
            for name in reader.get_variable_to_shape_map()
            if not name.startswith(("seconds", "_CHECKPOINTABLE"))
        }
        found.append((os.path.basename(path), variables))
    return found


def final_state(workdir):
    return states(workdir)[0]


def assert_equal_states(one, two):
    """Compares two results of `states`, bit for bit."""
    assert [name for name, _ in one] == [name for name, _ in two]
    for (step, mine), (_, other) in zip(one, two):
        assert mine.keys() == other.keys() and len(mine) > 100
        assert any("queue" in name for name in mine)
        for name, value in mine.items():
            np.testing.assert_array_equal(
                value, other[name], err_msg=f"{step} {name}"
            )


def lines(workdir):
    """Returns the logged metrics, except those that depend on the clock."""
    entries = metrics_log.read(workdir)
    for entry in entries:
        entry.pop("images_per_second", None)
    return entries
