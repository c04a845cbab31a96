"""Calls from a graph to Python do not prevent the end of the process."""

import subprocess
import sys

# When the process ends, a traceback still holds a pipeline with calls in
# progress.
SCRIPT = """
import time

import tensorflow as tf

from clsa_tf.data.graph_calls import in_python


def slow(i):
    time.sleep(0.2)
    return i


def fail():
    calls = tf.data.Dataset.range(1000).map(
        lambda i: in_python(slow, [i], tf.int64, stateful=False),
        num_parallel_calls=4,
    )
    batches = iter(calls.batch(2).prefetch(4))
    next(batches)
    raise ValueError("failed with a pipeline")


fail()
"""


def test_a_process_ends_with_calls_in_progress():
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert "ValueError: failed with a pipeline" in ended.stderr
