"""MoCo beyond what every method has to fulfil."""

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.methods import moco
from clsa_tf.options.fields import Crop
from tests import golden, tiny


def rows(x):
    return tf.constant(x, tf.float32)


@pytest.mark.parametrize("name", ["moco", "clsa"])
def test_symmetric_loss_is_the_mean_of_both_directions(name):
    settings = dict(batch_size=4, queue_size=16, projection_size=8)
    if name == "clsa":
        settings["ddm_weight"] = 0.0
    both = tiny.make(tiny.config(name, symmetric=True, **settings))
    one = tiny.make(tiny.config(name, **settings))
    for method in (both, one):
        method.queue.keys.assign(golden.QUEUE)
    loss, _ = both.compare(
        {"query_0": rows(golden.WEAK), "key": rows(golden.STRONG)},
        {"key": rows(golden.KEYS), "query_0": rows(golden.WEAK_2)},
        tf.range(4),
    )
    there, _ = one.compare(
        {"query_0": rows(golden.WEAK)}, {"key": rows(golden.KEYS)}, tf.range(4)
    )
    back, _ = one.compare(
        {"query_0": rows(golden.STRONG)},
        {"key": rows(golden.WEAK_2)},
        tf.range(4),
    )
    np.testing.assert_allclose(loss, (there + back) / 2, atol=1e-6)


@pytest.mark.parametrize("kind", ["split", "sync"])
def test_symmetric_keys_are_those_of_their_own_images(kind):
    """Whatever the order in which they were encoded."""
    config = tiny.config(
        "moco", symmetric=True, batch_norm=kind, batch_norm_splits=1
    )
    method = tiny.make(config)
    batch = method._complete(next(iter(tiny.batches(config, 1))))
    assert "key_rows" not in batch
    targets = method.targets(batch)
    for name in ("key", "query_0"):
        expected = method.encoder.project(batch[name], training=True)
        np.testing.assert_allclose(targets[name], expected, atol=1e-5)


def test_symmetric_keys_are_encoded_in_another_order():
    """Else a query and its key would be normalised with the same images."""
    config = tiny.config("moco", symmetric=True, batch_norm="split")
    method = tiny.make(config)
    images = np.arange(tiny.ROWS, dtype=np.uint8).reshape(-1, 1, 1, 1)
    images = tf.constant(images)
    orders = []
    for purpose in (0, 1, 0):
        shuffled, shown = method.shuffle(images, purpose)
        np.testing.assert_array_equal(tf.reshape(shuffled, [-1]), shown)
        assert sorted(shown.numpy()) == list(range(tiny.ROWS))
        orders.append(shown.numpy().tolist())
    assert orders[0] != orders[1] and orders[0] == orders[2]
    assert orders[0] != list(range(tiny.ROWS))
    method.steps_taken.assign_add(1)
    assert method.shuffle(images, 0)[1].numpy().tolist() != orders[0]


def test_symmetric_stores_both_views_keys():
    config = tiny.config("moco", symmetric=True)
    method = tiny.make(config)
    tiny.fit(method, tiny.batches(config, 1))
    assert method.queue.pointer == 2 * tiny.ROWS


def test_symmetric_with_several_queries():
    config = tiny.config(
        "moco",
        symmetric=True,
        query_crops=(Crop(16, 0.2, 1.0), Crop(12, 0.1, 0.8)),
    )
    method = tiny.make(config)
    assert method.directions() == [
        ("key", ["query_0", "query_1"]),
        ("query_0", ["key", "query_1"]),
    ]
    (report,) = tiny.fit(method, tiny.batches(config, 1))
    assert np.isfinite(report["loss"])


def test_version_1_has_a_linear_head():
    method = tiny.make(tiny.config("moco", projection_layers=1))
    head = method.encoder.heads[0]
    features = method.encoder.features
    shapes = [v.shape.as_list() for v in head.variables]
    assert shapes == [[features, 16], [16]]


def test_useless_counts_candidates_and_queries():
    two = dict(query_crops=(Crop(16, 0.2, 1.0), Crop(16, 0.2, 1.0)))

    def useless(**changes):
        return moco.MoCo.useless(tiny.config("moco", queue_size=40, **changes))

    assert useless() == pytest.approx(np.log(41))
    assert useless(inbatch_negatives=True) == pytest.approx(np.log(56))
    assert useless(**two) == pytest.approx(2 * np.log(41))
    assert useless(over_crops="mean", **two) == pytest.approx(np.log(41))
