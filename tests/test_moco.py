"""Properties of MoCo beyond those of every method."""

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.methods import moco
from clsa_tf.options.fields import Crop
from tests import golden, tiny


def rows(x):
    return tf.constant(x, tf.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moco", "clsa"])
def test_symmetric_loss_is_the_mean_of_both_directions(name):
    settings = dict(batch_size=4, queue_size=16, projection_size=8)
    if name == "clsa":
        settings["ddm_weight"] = 0.0
    both = tiny.make(tiny.config(name, symmetric=True, **settings))
    one = tiny.make(tiny.config(name, **settings))
    for method in (both, one):
        method.queue.keys.assign(golden.QUEUE)
    loss, _ = both.loss(
        {"query_0": rows(golden.WEAK), "key": rows(golden.STRONG)},
        {"key": rows(golden.KEYS), "query_0": rows(golden.WEAK_2)},
        {"example_ids": tf.range(4)},
    )
    one_direction, _ = one.loss(
        {"query_0": rows(golden.WEAK)},
        {"key": rows(golden.KEYS)},
        {"example_ids": tf.range(4)},
    )
    other_direction, _ = one.loss(
        {"query_0": rows(golden.STRONG)},
        {"key": rows(golden.WEAK_2)},
        {"example_ids": tf.range(4)},
    )
    np.testing.assert_allclose(
        loss, (one_direction + other_direction) / 2, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["split", "sync"])
def test_symmetric_keys_belong_to_their_own_images(kind):
    """The order in which they are encoded does not matter."""
    config = tiny.config(
        "moco", symmetric=True, batch_norm=kind, batch_norm_splits=1
    )
    method = tiny.make(config)
    batch = method._complete(next(iter(tiny.batches(config, 1))))
    targets = method.targets(batch)
    for name in ("key", "query_0"):
        expected = method.encoder.project(batch[name], training=True)
        np.testing.assert_allclose(targets[name], expected, atol=1e-5)


def test_symmetric_keys_are_encoded_in_another_order():
    """Otherwise query and key would be normalised with the same images."""
    config = tiny.config("moco", symmetric=True, batch_norm="split")
    method = tiny.make(config)
    batch = next(iter(tiny.batches(config, 1)))
    names = np.arange(tiny.ROWS, dtype=np.uint8).reshape(-1, 1, 1, 1)
    seen = []
    method.project_keys = lambda x: (
        seen.append(x) or tf.cast(x[:, 0, 0], tf.float32)
    )
    batch |= {"key": tf.constant(names), "query_0": tf.constant(names)}
    keys = method.targets(method._complete(batch))
    for images, name in zip(seen, ("key", "query_0")):
        np.testing.assert_array_equal(
            tf.reshape(images, [-1]), batch[f"{name}_order"]
        )
        np.testing.assert_array_equal(keys[name], names[:, 0, 0])


@pytest.mark.slow
def test_symmetric_queue_stores_the_keys_of_both_views():
    config = tiny.config("moco", symmetric=True)
    method = tiny.make(config)
    tiny.fit(method, tiny.batches(config, 1))
    assert method.queue.pointer == 2 * tiny.ROWS


def test_symmetric_loss_allows_several_queries():
    config = tiny.config(
        "moco",
        symmetric=True,
        query_crops=(Crop(16, 0.2, 1.0), Crop(12, 0.1, 0.8)),
    )
    method = tiny.make(config)
    outputs = method.forward(next(iter(tiny.batches(config, 1))))
    assert [*outputs] == ["query_0", "query_1", "key"]
    (report,) = tiny.fit(method, tiny.batches(config, 1))
    assert np.isfinite(report["loss"])


def test_version_1_has_a_linear_head():
    method = tiny.make(tiny.config("moco", projection_layers=1))
    head = method.encoder.heads[0]
    features = method.encoder.features
    shapes = [v.shape.as_list() for v in head.variables]
    assert shapes == [[features, 16], [16]]


def test_chance_loss_counts_candidates_and_queries():
    two = dict(query_crops=(Crop(16, 0.2, 1.0), Crop(16, 0.2, 1.0)))

    def chance(**changes):
        config = tiny.config("moco", queue_size=40, **changes)
        return moco.MoCo.chance_loss(config)

    assert chance() == pytest.approx(np.log(41))
    assert chance(inbatch_negatives=True) == pytest.approx(np.log(56))
    assert chance(**two) == pytest.approx(2 * np.log(41))
    assert chance(over_crops="mean", **two) == pytest.approx(np.log(41))
