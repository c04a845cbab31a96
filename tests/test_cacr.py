"""Properties of the three methods of CACR beyond those of every method."""

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf.errors import UserError
from clsa_tf.options.fields import Crop
from tests import cacr, golden, tiny
from tests.marks import slow_but

VIEWS = {f"view_{i}": x for i, x in enumerate(golden.VIEWS)}
KEYS = {f"view_{i}": x for i, x in enumerate(golden.KEYS_OF_VIEWS)}
LOCAL = dict(local_crops=(Crop(12, 0.05, 0.4),))
# The settings in which published views differ.
VIEW_SETTINGS = ("size", "min_area", "max_area", "jitter", "jitter_probability")


def golden_method(name, **changes):
    changes = {"batch_size": 4, "projection_size": 8} | changes
    if name == "cacr_moco":
        changes["queue_size"] = 16
    method = tiny.make(tiny.config(name, **changes))
    for queue in tiny.queues(method):
        queue.keys.assign(golden.QUEUE)
    return method


def tensors(arrays):
    return {k: tf.constant(x, tf.float32) for k, x in arrays.items()}


def mean_losses(method, projections, targets=None):
    """Means of the loss and of the reports."""
    targets = targets and tensors(targets)
    loss, reports = method.loss(
        tensors(projections), targets, {"example_ids": tf.range(4)}
    )
    assert {x.shape[0] for x in [loss, *reports.values()]} == {4}
    return {k: np.mean(x) for k, x in ({"loss": loss} | reports).items()}


@pytest.mark.parametrize(
    "name, targets, attraction, repulsion",
    [
        ("cacr", None, 0.04921675174411272, -0.7998611967203543),
        ("cacr_moco", KEYS, 0.05180975589931453, -0.3009848239587931),
    ],
)
def test_attraction_and_repulsion_equal_golden_values(
    name, targets, attraction, repulsion
):
    for weights in ((1.0, 1.0), (2.0, 3.0)):
        method = golden_method(
            name, attraction_weight=weights[0], repulsion_weight=weights[1]
        )
        found = mean_losses(method, VIEWS, targets)
        parts = weights[0] * attraction, weights[1] * repulsion
        assert found["attraction"] == pytest.approx(parts[0], abs=1e-6)
        assert found["repulsion"] == pytest.approx(parts[1], abs=2e-6)
        assert found["loss"] == pytest.approx(sum(parts), abs=2e-6)
        assert found["loss"] == found["contrast"]


def test_crop_reduction_sum_counts_views_and_pairs():
    method = golden_method("cacr", over_crops="sum")
    found = mean_losses(method, VIEWS)
    assert found["attraction"] == pytest.approx(3 * 0.04921675174411272)
    assert found["repulsion"] == pytest.approx(3 * -0.7998611967203543)


@pytest.mark.parametrize("name", ["cacr", "cacr_moco", "cacr_mocov3"])
def test_accuracy_finds_the_first_view_among_the_second(name):
    method = golden_method(name)
    first = {f"view_{i}": np.eye(4, 8) for i in range(3)}
    # Of 4 rows only the first is nearest to its own.
    second = dict(first, view_1=np.eye(4, 8)[[0, 3, 1, 2]])
    found = mean_losses(
        method, *((second,) if name == "cacr" else (first, second))
    )
    assert found["contrast_accuracy"] == 0.25


def test_without_inbatch_negatives_only_the_queue_repels():
    method = golden_method("cacr_moco", inbatch_negatives=False)
    assert not method.whole_batch
    expected = []
    for query in np.concatenate(golden.VIEWS):
        costs = [cacr.distance(query, key) for key in golden.QUEUE]
        weights = cacr.softmax([-2.0 * d for d in costs])
        expected.append(-cacr.weighted(weights, costs))
    found = mean_losses(method, VIEWS, KEYS)["repulsion"]
    assert found == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("inbatch", [True, False])
def test_inbatch_negatives_get_gradients(inbatch):
    method = golden_method("cacr_moco", inbatch_negatives=inbatch)
    views, keys = tensors(VIEWS), tensors(KEYS)
    with tf.GradientTape() as tape:
        tape.watch(views)
        loss, _ = method.loss(views, keys, {"example_ids": tf.range(4)})
        first = loss[0]
    for gradient in tape.gradient(first, views).values():
        rows = np.abs(gradient).max(axis=1)
        assert rows[0] > 0.01
        assert (rows[1:] > 0).all() == inbatch


@pytest.mark.parametrize(
    "temperature, value", [(1.0, 1.983579478578603), (0.2, 0.1673062025505335)]
)
@pytest.mark.parametrize("reduction, count", [("mean", 1), ("sum", 2)])
def test_contrast_of_momentum_keys_equals_golden_values(
    temperature, value, reduction, count
):
    method = golden_method(
        "cacr_mocov3", temperature=temperature, over_crops=reduction, **LOCAL
    )
    # Each key is compared with one of the first two views, and the local one.
    views = dict(view_0=golden.WEAK, view_1=golden.WEAK, view_2=golden.STRONG)
    keys = dict(view_0=golden.KEYS, view_1=golden.KEYS)
    found = mean_losses(method, views, keys)
    assert found["loss"] == pytest.approx(count * value, abs=2e-6)


def test_two_views_have_half_the_loss_of_moco_v3():
    views = dict(view_0=golden.WEAK, view_1=golden.STRONG)
    keys = dict(view_0=golden.WEAK_2, view_1=golden.KEYS)
    t = 0.2

    def direction(query, key):
        """MoCo v3's `contrastive_loss`: `2 T` times cross-entropy."""
        logits = query @ key.T / t
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -2 * t * np.mean(np.diag(logits))

    moco_v3 = direction(golden.WEAK, golden.KEYS)
    moco_v3 += direction(golden.STRONG, golden.WEAK_2)
    for reduction, share in (("mean", 0.5), ("sum", 1.0)):
        method = golden_method(
            "cacr_mocov3", temperature=t, over_crops=reduction
        )
        found = mean_losses(method, views, keys)
        assert found["loss"] == pytest.approx(share * moco_v3, abs=1e-6)


def test_euclidean_cost_with_local_keys_equals_the_formula():
    method = golden_method(
        "cacr_mocov3", cost="euclidean", local_keys=True, **LOCAL
    )
    expected = 0.0
    for name, key in KEYS.items():
        queries = [x for view, x in VIEWS.items() if view != name]
        expected += np.mean(cacr.euclidean(queries, key, range(4), 1.0)) / 3
    found = mean_losses(method, VIEWS, KEYS)
    assert found["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "changes, keys",
    slow_but(
        1,
        [
            (LOCAL, 2),
            (dict(local_keys=True, **LOCAL), 3),
            (dict(local_keys=True, cost="euclidean", **LOCAL), 3),
        ],
    ),
    ids=["light", "full", "euclidean"],
)
def test_local_crops_train(changes, keys):
    method = tiny.make(tiny.config("cacr_mocov3", **changes))
    dataset = tiny.batches(method.config, 1)
    targets = method.targets(next(iter(dataset)))
    assert list(targets) == [f"view_{i}" for i in range(keys)]
    assert {tuple(x.shape) for x in targets.values()} == {(16, 16)}
    (report,) = tiny.fit(method, dataset)
    # Untrained predictions have about the chance-level loss.
    chance = method.chance_loss(method.config)
    assert report["loss"] == pytest.approx(chance, abs=0.7)
    assert report["loss"] != pytest.approx(chance, abs=1e-6)


@pytest.mark.parametrize("name", ["cacr", "cacr_moco", "cacr_mocov3"])
def test_chance_loss_is_the_loss_of_identical_projections(name):
    for cost in ("rbf", "euclidean") if name == "cacr_mocov3" else ("",):
        method = golden_method(name, **({"cost": cost} if cost else {}))
        same = {f"view_{i}": np.eye(8)[[0] * 4] for i in range(3)}
        for queue in tiny.queues(method):
            queue.keys.assign(np.eye(8)[[0] * 16])
        found = mean_losses(method, same, same)["loss"]
        assert found == pytest.approx(
            method.chance_loss(method.config), abs=1e-5
        )


def test_keys_of_the_last_view_enter_the_queue_in_order():
    config = tiny.config("cacr_moco")
    method = tiny.make(config)
    batch = next(iter(tiny.batches(config, 1)))
    # Before the step the two encoders are equal.
    expected = method.encoder.project(batch["view_2"], training=True)
    tiny.fit(method, tiny.batches(config, 1))
    found = method.queue.keys[: tiny.ROWS]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert method.queue.pointer == tiny.ROWS


@pytest.mark.parametrize("compiled", [False, True])
def test_keys_are_encoded_shuffled_and_returned_in_order(compiled):
    config = tiny.config("cacr_moco", batch_norm="split", batch_norm_splits=4)
    method = tiny.make(config)
    batch = next(iter(tiny.batches(config, 1)))

    def network(images):
        return tf.reduce_mean(tf.cast(images, tf.float32), axis=[1, 2])

    method.project_keys = network

    @tf.function(jit_compile=compiled)
    def encode(batch):
        batch = method._complete(batch)
        images, order = method._shuffled(batch, "view_1")
        keys = method.shuffled_keys(batch, ["view_0", "view_1"])
        return keys["view_1"], images, order

    keys, images, order = encode(batch)
    np.testing.assert_allclose(keys, network(batch["view_1"]), rtol=1e-5)
    np.testing.assert_array_equal(images, tf.gather(batch["view_1"], order))
    assert not np.array_equal(order, np.arange(16))
    assert sorted(order.numpy()) == list(range(16))


@pytest.mark.slow
def test_queue_only_loss_accumulates_without_the_whole_batch():
    """The step equals that of the whole batch."""
    found = []
    for parts in (1, 2):
        config = tiny.config(
            "cacr_moco",
            inbatch_negatives=False,
            batch_norm="split",
            batch_norm_splits=4,
            accumulation_steps=parts,
            base_lr=0.03,
        )
        method = tiny.make(config)
        (report,) = tiny.fit(method, tiny.batches(config, 1))
        found.append((report, [v.numpy() for v in method.learned]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4, abs=1e-5)
    for one, two in zip(found[0][1], found[1][1]):
        np.testing.assert_allclose(two, one, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize(
    "name, view_settings, blur, solarize",
    [
        ("cacr", [(224, 0.2, 1.0, (0.4,) * 4, 1.0)] * 5, [0.0] * 5, [0.0] * 5),
        (
            "cacr_moco",
            [(224, 0.2, 1.0, (0.4, 0.4, 0.4, 0.1), 0.8)] * 5,
            [0.5] * 5,
            [0.0] * 5,
        ),
        (
            "cacr_mocov3",
            [(224, 0.2, 1.0, (0.4, 0.4, 0.2, 0.1), 0.8)] * 2
            + [(96, 0.05, 0.4, (0.4, 0.4, 0.2, 0.1), 0.8)] * 8,
            [1.0, 0.1] + [0.5] * 8,
            [0.0, 0.2] + [0.0] * 8,
        ),
    ],
)
def test_default_views_are_as_published(name, view_settings, blur, solarize):
    changes = {}
    if name == "cacr_mocov3":
        changes["local_crops"] = Crop.parse_all("8x96:0.05:0.4")
    config = config_lib.default(name, **changes)
    config_lib.check(config)
    views = config_lib.methods.load(name).METHOD.views(config.options)
    assert [x.name for x in views] == [
        f"view_{i}" for i in range(len(view_settings))
    ]
    assert [
        tuple(getattr(x, k) for k in VIEW_SETTINGS) for x in views
    ] == view_settings
    assert [x.blur for x in views] == blur
    assert [x.solarize for x in views] == solarize
    assert {x.gray for x in views} == {0.2}
    # Keys are shuffled where both encoders use the view.
    both = name == "cacr_moco"
    assert all((x.shuffle, x.both_orders) == (both, both) for x in views)


def test_predictor_and_projector_equal_those_of_moco_v3():
    method = tiny.make(
        tiny.config("cacr_mocov3", projection_size=6, projection_hidden=20)
    )
    features = method.encoder.features
    shapes = {
        "head": [(features, 20), (20,), (20,), (20, 6)],
        "predictor": [(6, 20), (20,), (20,), (20, 6)],
    }
    (head,) = method.encoder.heads
    for model, name in ((head, "head"), (method.predictor, "predictor")):
        found = [tuple(v.shape) for v in model.trainable_variables]
        assert found == shapes[name], name
    # The projector's last normalisation has no weights, the predictor has none.
    assert len(head.non_trainable_variables) == 4
    assert len(method.predictor.non_trainable_variables) == 2


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("cacr", dict(crops=()), "at least two crops in --crops.* received 0"),
        (
            "cacr_moco",
            dict(crops=(Crop(16, 0.2, 1.0),)),
            "at least two crops in --crops.* received 1",
        ),
        ("cacr_moco", dict(queue_size=15), "queue_size of at least 16, .*=15;"),
        ("cacr", dict(repulsion_weight=0.0), "above 0.* --repulsion_weight"),
        ("cacr", dict(attraction_sharpness=-1.0), "at least 0"),
        ("cacr_mocov3", dict(local_keys=True), "local crops for --local_keys"),
        ("cacr_mocov3", dict(cost="cosine"), "rbf, euclidean"),
        ("cacr_mocov3", dict(view_blur=(1.0,)), "for --view_blur"),
    ],
)
def test_impossible_options_are_rejected(name, changes, message):
    with pytest.raises(UserError, match=message):
        config_lib.check(tiny.config(name, backbone="resnet18", **changes))
