"""`--deterministic`: large networks repeat their steps bit for bit."""

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.distributed import strategy
from clsa_tf.errors import UserError
from clsa_tf.options.fields import Crop
from clsa_tf.training import metrics_log
from tests import runs, tiny


def repeated_steps():
    """Number of variables that differ between repetitions of three steps."""
    strategy.make_deterministic()
    crop = Crop(32, 0.2, 1.0)
    config = tiny.config(
        "moco",
        backbone="resnet18",
        width=1.0,
        batch_size=32,
        base_lr=0.03,
        key_crop=crop,
        query_crops=(crop,),
    )
    method = tiny.make(config)
    batches = list(tiny.batches(config, 3))
    step = tf.function(method.train_step)
    variables = [*method.variables, *method.optimizer.variables]
    start = [v.numpy() for v in variables]
    found = []
    for _ in range(4):
        for variable, value in zip(variables, start):
            variable.assign(value)
        for batch in batches:
            step(batch)
        found.append([v.numpy() for v in variables])
    return sum(
        any(np.any(values[0] != value) for value in values)
        for values in zip(*found)
    )


@pytest.mark.slow
def test_steps_of_a_large_network_are_repeated_bit_for_bit():
    """Without the setting, ten of ten repetitions differed on two threads."""
    assert runs.in_new_process(repeated_steps) == 0


@pytest.mark.slow
def test_a_command_trains_and_evaluates(photos, tmp_path):
    command = runs.train(photos, tmp_path, "--deterministic")
    runs.call(command)
    entries = metrics_log.read(tmp_path)
    assert "knn" in entries[-1], entries[-1]


def test_a_process_that_has_computed_is_rejected():
    tf.constant(1.0) + 1.0
    with pytest.raises(UserError, match="has computed.*at the start"):
        strategy.make_deterministic()
