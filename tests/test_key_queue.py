import numpy as np
import tensorflow as tf

from clsa_tf.methods.key_queue import KeyQueue


def test_starts_with_unit_keys_that_depend_on_the_seed():
    one, same, other = (KeyQueue(10, 4, seed=s).keys.numpy() for s in (1, 1, 2))
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


def test_it_starts_as_it_did():
    """Golden values: with others, runs could not be repeated."""
    np.testing.assert_allclose(
        KeyQueue(2, 3, seed=1).keys,
        [
            [0.15619098, -0.6080107, 0.7784134],
            [-0.42974502, 0.3096013, -0.8482135],
        ],
        atol=1e-6,
    )


def test_the_queue_is_first_in_first_out_over_three_wraps():
    size, batch, dimension = 10, 4, 3
    queue = KeyQueue(size, dimension, seed=0)
    expected = queue.keys.numpy()
    enqueue = tf.function(queue.enqueue)
    for step in range(8):
        keys = np.float32(np.arange(batch * dimension) + 100 * step)
        keys = keys.reshape(batch, dimension)
        enqueue(keys)
        for i, key in enumerate(keys):
            expected[(step * batch + i) % size] = key
        np.testing.assert_array_equal(queue.keys, expected)
        assert queue.pointer == (step + 1) * batch % size


def test_a_batch_as_long_as_the_queue_replaces_all_of_it():
    queue = KeyQueue(4, 2, seed=0)
    queue.enqueue(tf.ones([1, 2]))
    keys = np.float32(np.arange(8)).reshape(4, 2)
    queue.enqueue(keys)
    np.testing.assert_array_equal(queue.keys, np.roll(keys, 1, axis=0))
