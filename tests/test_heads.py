"""Projection heads: their variables, and their outputs against NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.errors import UserError
from clsa_tf.networks.encoder import Encoder, make_heads
from clsa_tf.networks.heads import KINDS, Head, build
from tests import tiny

EPSILON = 1e-5


def weights(model):
    return {v.name.split(":")[0]: v.numpy() for v in model.variables}


def normalised(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)


def randomised(model):
    rng = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(rng.uniform(0.2, 1.0, v.shape))
    return model


@pytest.mark.parametrize(
    "kind, variables",
    [
        # For three layers: variables of a hidden layer, then of the last.
        ("plain", (["kernel", "bias"], ["kernel", "bias"])),
        ("simclr", (["kernel", "gamma", "beta"], ["kernel", "gamma"])),
        ("byol", (["kernel", "gamma", "beta"], ["kernel"])),
        ("mocov3", (["kernel", "gamma", "beta"], ["kernel"])),
        ("mocov3_predictor", (["kernel", "gamma", "beta"], ["kernel"])),
    ],
)
def test_each_kind_has_its_variables(kind, variables):
    model = build(Head(kind, 3, 7, 5), 6)
    names = [v.name.split(":")[0] for v in model.trainable_variables]
    hidden, last = variables
    for layer, parts in ((0, hidden), (2, hidden), (4, last)):
        found = [n for n in names if n.startswith(f"fc.{layer}")]
        assert [n.rsplit("/", 1)[1] for n in found] == parts
    assert model.output_shape == (None, 5)
    shapes = [v.shape for v in model.variables if "kernel" in v.name]
    assert [list(s) for s in shapes] == [[6, 7], [7, 7], [7, 5]]


@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_equal_numpy(kind):
    model = randomised(build(Head(kind, 2, 7, 5), 6))
    x = np.random.default_rng(0).normal(size=[8, 6]).astype(np.float32)
    w = weights(model)
    y = x @ w["fc.0/kernel"] + w.get("fc.0/bias", 0)
    if kind != "plain":
        y = normalised(y) * w["fc.0.bn/gamma"] + w["fc.0.bn/beta"]
    y = np.maximum(y, 0) @ w["fc.2/kernel"] + w.get("fc.2/bias", 0)
    if kind == "simclr":
        y = normalised(y) * w["fc.2.bn/gamma"]
    if kind == "mocov3":
        y = normalised(y)
    np.testing.assert_allclose(model(x, training=True), y, rtol=1e-3, atol=1e-4)


def test_one_layer_is_linear():
    model = build(Head("plain", 1, 7, 5), 6)
    assert [list(v.shape) for v in model.variables] == [[6, 5], [5]]


@pytest.mark.parametrize("kind", ["simclr", "mocov3"])
def test_parts_of_a_batch_equal_separate_batches(kind):
    """One device with `split` computes the same as several with `local`."""
    x = np.random.default_rng(0).normal(size=[8, 6]).astype(np.float32)
    split = randomised(
        build(Head(kind, 2, 7, 5), 6, bn_kind="split", bn_splits=2)
    )
    local = randomised(build(Head(kind, 2, 7, 5), 6))
    whole = split(x, training=True)
    halves = [local(x[:4], training=True), local(x[4:], training=True)]
    np.testing.assert_allclose(whole, np.concatenate(halves), atol=1e-5)


def test_heads_differ_and_follow_from_the_seed():
    one, two = make_heads(Head(outputs=5), 2, 6, seed=3)
    again = make_heads(Head(outputs=5), 1, 6, seed=3)[0]
    kernels = [x.variables[0].numpy() for x in (one, two, again)]
    assert not np.array_equal(kernels[0], kernels[1])
    np.testing.assert_array_equal(kernels[0], kernels[2])


def encoder(**changes):
    return Encoder(
        backbone="tiny",
        width=0.125,
        stem="small",
        head=Head(outputs=5),
        **changes,
    )


IMAGES = np.uint8(np.random.default_rng(0).integers(0, 256, [2, 8, 8, 3]))


def test_projections_of_several_heads_are_one_unit_vector():
    made = encoder(heads=3)
    rows = made.project_heads(IMAGES)
    assert rows.shape == [2, 3, 5]
    np.testing.assert_allclose(tf.norm(rows, axis=-1), 1, atol=1e-6)
    whole = made.project(IMAGES)
    # Cosines of this vector are means of the heads' cosines.
    np.testing.assert_allclose(
        whole, np.reshape(rows, [2, 15]) / np.sqrt(3), atol=1e-6
    )
    assert made.projections == 15


def test_concatenated_features_are_hidden_layers():
    plain, plus = encoder(heads=2), encoder(heads=2, concatenate=True)
    features = plain(IMAGES)
    hidden = [
        np.maximum(features @ w["fc.0/kernel"] + w["fc.0/bias"], 0)
        for w in (
            {k.replace("head1.", ""): v for k, v in weights(h).items()}
            for h in plain.heads
        )
    ]
    np.testing.assert_allclose(
        plus(IMAGES), np.concatenate(hidden, axis=1), atol=1e-6
    )
    assert plus.features == 2 * plain.features
    np.testing.assert_array_equal(
        plus.features_and_projections(IMAGES)[0], plus(IMAGES)
    )
    # The projections are those of the same heads.
    np.testing.assert_array_equal(plus.project(IMAGES), plain.project(IMAGES))


def test_joined_crops_share_the_statistics_of_their_part():
    """Each part of the batch is normalised with that part of all crops."""
    method = tiny.make(
        tiny.config(
            "simclr", batch_norm="split", batch_norm_splits=4, ddm_weight=0.0
        )
    )
    batch = next(iter(tiny.batches(method.config, 1)))
    seen = []

    def network(images):
        seen.append(images.numpy())
        return tf.cast(images[:, 0, 0], tf.float32)

    found = method.encode_views(network, batch, ["view_0", "view_1"])
    (joined,) = seen
    # Eight rows for each of four parts: four of each view.
    np.testing.assert_array_equal(joined[:4], batch["view_0"][:4])
    np.testing.assert_array_equal(joined[4:8], batch["view_1"][:4])
    np.testing.assert_array_equal(joined[8:12], batch["view_0"][4:8])
    for name, rows in found.items():
        np.testing.assert_array_equal(rows, batch[name][:, 0, 0])


def test_crops_of_other_sizes_are_not_joined():
    method = tiny.make(tiny.config("simclr"))
    batch = next(iter(tiny.batches(method.config, 1)))
    shapes = []

    def network(images):
        shapes.append(images.shape)
        return tf.cast(images[:, 0, 0], tf.float32)

    names = ["view_0", "strong_0", "view_1"]
    found = method.encode_views(network, batch, names)
    assert [s[:2] for s in shapes] == [[2 * tiny.ROWS, 16], [tiny.ROWS, 12]]
    assert list(found) == names


def test_unknown_head_layers_are_rejected(exported):
    from clsa_tf.api.load import load_encoder

    with pytest.raises(UserError, match="0 to 1 hidden layers"):
        load_encoder(exported.workdir, head_layers=2)
