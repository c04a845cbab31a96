"""Collectives on four replicas, compared with NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.distributed import collectives
from tests import runs

REPLICAS, ROWS = 4, 3


# Bytes travel in groups of four: 75 of them need padding, 48 do not.
SHAPES = [(5, 5, 3), (4, 4, 3)]


def of_replicas():
    """Runs in a process of its own: the number of devices is fixed there."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * REPLICAS
    )
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(REPLICAS)]
    )

    @tf.function
    def step(images, order):
        ids = collectives.example_ids(ROWS)
        own = tf.gather(images, ids)
        return (
            collectives.exchange(own, tf.gather(order, ids)),
            collectives.gather(tf.cast(own, tf.float32)),
            collectives.mean({"x": tf.cast(ids[0], tf.float32)})["x"],
        )

    return [
        [
            [x.numpy() for x in strategy.experimental_local_results(result)]
            for result in strategy.run(step, args=batch(shape))
        ]
        for shape in SHAPES
    ]


def batch(shape):
    rng = np.random.default_rng(1)
    rows = REPLICAS * ROWS
    images = rng.integers(0, 256, [rows, *shape], dtype=np.uint8)
    return images, np.int32(rng.permutation(rows))


@pytest.fixture(scope="module")
def found():
    return dict(zip(SHAPES, runs.in_new_process(of_replicas)))


@pytest.mark.parametrize("shape", SHAPES)
def test_collectives_equal_numpy(shape, found):
    exchanged, gathered, means = found[shape]
    images, order = batch(shape)
    np.testing.assert_array_equal(np.concatenate(exchanged), images[order])
    for copy in gathered:
        np.testing.assert_array_equal(copy, images)
    # The mean of each replica's first id, 0, 3, 6 and 9.
    assert means == [4.5] * REPLICAS
