"""Properties of every method; a new method is tested without other edits."""

import re

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from benchmarks import pillow_chain
from clsa_tf import methods
from clsa_tf.augment.views import packed_width, params_key
from clsa_tf.data.open import open_source
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.shapes.dataset import encoded_example
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.methods import base
from clsa_tf.methods.moco import MoCo
from clsa_tf.methods.momentum import MomentumMethod
from clsa_tf.networks import functional
from clsa_tf.options.fields import Crop
from clsa_tf.training.checkpoint import Checkpoints
from export.model.served import ServedEncoder
from tests import golden, tiny
from tests.marks import slow_but


def of_class(kind):
    """Parametrizes a test with the methods that derive from a class."""
    found = [n for n in methods.names() if issubclass(method_class(n), kind)]
    return pytest.mark.parametrize("name", found)


def method_class(name):
    return methods.load(name).METHOD


every = of_class(object)
# CLSA in `make test`, the others in `make test-slow`.
clsa_first = pytest.mark.parametrize(
    "name",
    slow_but(1, ["clsa", *(n for n in methods.names() if n != "clsa")]),
)


def arrays(variables):
    return [v.numpy().copy() for v in variables]


def assert_all_equal(one, two):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        np.testing.assert_array_equal(a, b)


@of_class(MomentumMethod)
def test_momentum_encoder_equals_the_encoder_at_the_start(name):
    method = tiny.make(tiny.config(name))
    assert_all_equal(
        arrays(method.momentum_encoder.variables),
        arrays(method.encoder.variables),
    )


@every
def test_gradients_reach_all_learned_variables(name):
    method = tiny.make(tiny.config(name, l2=0.0))
    before = arrays(method.learned)
    tiny.fit(method, tiny.batches(method.config, 1), eager=True)
    for variable, old in zip(method.learned, before):
        assert not np.array_equal(variable, old), variable.name
    own = {v.ref() for v in method.learned}
    assert own >= {v.ref() for v in method.encoder.trainable_variables}


@of_class(MomentumMethod)
def test_gradients_do_not_reach_the_momentum_encoder(name):
    method = tiny.make(tiny.config(name, key_momentum=1.0, l2=0.0))
    keys = arrays(method.momentum_encoder.trainable_variables)
    weights = arrays(method.momentum_encoder.weights)
    tiny.fit(method, tiny.batches(method.config, 1), eager=True)
    assert_all_equal(arrays(method.momentum_encoder.trainable_variables), keys)
    # Its batch normalisation does use the batch.
    assert not all(
        np.array_equal(v, old)
        for v, old in zip(method.momentum_encoder.weights, weights)
    )
    own = {v.ref() for v in method.momentum_encoder.variables}
    assert own.isdisjoint(v.ref() for v in method.learned)


@of_class(MomentumMethod)
def test_momentum_encoder_is_the_moving_average(name):
    method = tiny.make(
        tiny.config(name, key_momentum=0.75, key_momentum_schedule="constant")
    )
    keys = arrays(method.momentum_encoder.trainable_variables)
    tiny.fit(method, tiny.batches(method.config, 1), eager=True)
    for key, old, query in zip(
        method.momentum_encoder.trainable_variables,
        keys,
        method.encoder.trainable_variables,
    ):
        np.testing.assert_allclose(
            key, 0.75 * old + 0.25 * query, rtol=1e-5, atol=1e-7
        )


@of_class(MoCo)
def test_queue_holds_the_keys_in_the_order_of_the_batch(name):
    config = tiny.config(name)
    method = tiny.make(config)
    batch = next(iter(tiny.batches(config, 1)))
    in_order = tf.gather(batch["key"], np.argsort(batch["key_order"]))
    # Before the step the two encoders are equal, and batch statistics do not
    # depend on the order of the rows.
    expected = method.encoder.project(in_order, training=True)
    tiny.fit(method, tiny.batches(config, 1), eager=True)
    np.testing.assert_allclose(
        method.queue.keys[: tiny.ROWS], expected, atol=1e-5
    )
    assert method.queue.pointer == tiny.ROWS


@every
def test_a_dead_network_has_no_contrast_accuracy(name):
    """All its projections are equal, in every queue and view."""
    config = tiny.config(name, projection_size=100)
    method = tiny.make(config)
    dead = tf.math.l2_normalize(np.random.default_rng(0).normal(size=[1, 100]))
    dead = tf.cast(dead, tf.float32)
    for queue in tiny.queues(method):
        queue.keys.assign(tf.broadcast_to(dead, queue.keys.shape))
    batch = next(iter(tiny.batches(config, 1)))
    batch |= {"example_ids": tf.range(tiny.ROWS)}

    def killed(x):
        return None if x is None else tf.broadcast_to(dead[0], x.shape)

    targets = tf.nest.map_structure(killed, method.targets(batch))
    outputs = tf.nest.map_structure(killed, method.forward(batch))
    _, reports = method.loss(outputs, targets, batch)
    np.testing.assert_array_equal(reports["contrast_accuracy"], 0.0)


@clsa_first
def test_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    config = tiny.config(name)
    straight = tiny.make(config)
    expected = tiny.fit(straight, tiny.batches(config, 6))
    first = tiny.make(config)
    tiny.fit(first, tiny.batches(config, 3))
    Checkpoints(first, str(tmp_path), keep=1).save()
    second = tiny.make(config.replace(seed=9))  # the seed has no effect
    assert Checkpoints(second, str(tmp_path), keep=1).restore() == 3
    reports = tiny.fit(second, tiny.batches(config, 3, first=3))
    assert reports == expected[3:]
    assert_all_equal(arrays(second.variables), arrays(straight.variables))
    assert_all_equal(
        arrays(second.optimizer.variables), arrays(straight.optimizer.variables)
    )
    for one, two in zip(tiny.queues(second), tiny.queues(straight)):
        assert_all_equal(arrays(one.variables), arrays(two.variables))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Photographs of the embedded dataset, as files."""
    folder = tmp_path_factory.mktemp("shapes")
    for i in range(128):
        image = encoded_example("train", i)["image"]
        (folder / f"{i:03}.jpg").write_bytes(image.getvalue())
    return open_source(f"folder:{folder}", labels="none")


def real_batches(source, method, *, completed=True):
    return training_batches(
        source,
        method.views(method.config.options),
        batch_size=method.config.batch_size,
        seed=1,
        start_step=0,
        unreadable=UnreadableImages(max_bad_share=0.0),
        completed=completed,
    )


# Views that a small network learns to match within seconds.
PLAIN_CROP = Crop(16, 0.6, 1.0)
EASY = dict(
    key_crop=PLAIN_CROP,
    query_crops=(PLAIN_CROP,),
    crop=PLAIN_CROP,
    crops=(PLAIN_CROP,) * 3,
    jitter=(0.0, 0.0, 0.0, 0.0),
    gray=0.0,
    blur=0.0,
    view_blur=(0.0, 0.0),
    view_solarize=(0.0, 0.0),
    augmentations=("rotation",),
    queue_size=48,
    key_momentum=0.99,
)
# Settings for batches of 16, for which the defaults are not made.
SMALL_BATCH = {
    "byol": dict(key_momentum=0.95),
    "cacr_mocov3": dict(key_momentum=0.95, temperature=0.2),
    "simclr": dict(base_lr=0.1, temperature=0.5),
}


@pytest.mark.slow
@every
def test_loss_falls_below_chance(name, shapes):
    """Within 60 steps on `shapes`, and without a collapse."""
    known = methods.load(name).Options.__dataclass_fields__
    easy = {k: v for k, v in EASY.items() if k in known}
    changes = dict(base_lr=1.0) | easy | SMALL_BATCH.get(name, {})
    method = tiny.make(tiny.config(name, **changes))
    late = tiny.fit(method, real_batches(shapes, method).take(60))[-10:]
    chance = type(method).chance_loss(method.config)
    contrast = np.mean([r.get("contrast", r["loss"]) for r in late])
    if chance is not None:
        assert contrast < chance - 0.2 * max(abs(chance), 1.0)
    # Chance level is 1/16.
    assert np.mean([r["contrast_accuracy"] for r in late]) > 0.2
    assert np.mean([r["spread"] for r in late]) > 0.1


GOLDEN = {
    "moco": [
        (
            {},
            {"query_0": golden.WEAK},
            {"key": golden.KEYS},
            {"loss": 1.4571956530113974},
        )
    ],
    "clsa": [
        (
            {},
            {"query_0": golden.WEAK, "strong_0": golden.STRONG},
            {"key": golden.KEYS},
            {
                "loss": 1.5625960440085418 + 2.1969500206905180,
                "contrast": 1.5625960440085418,
                "ddm": 2.1969500206905180,
                "ddm_kl": 0.18665475522822627,
            },
        ),
        (
            {"ddm_temperature": 0.5, "ddm_weight": 2.0},
            {"query_0": golden.WEAK, "strong_0": golden.STRONG},
            {"key": golden.KEYS},
            {
                "loss": 1.5625960440085418 + 2 * 2.5718498358692754,
                "ddm_kl": 2.5718498358692754 - 2.5133294113795963,
            },
        ),
    ],
    "simclr": [
        (
            {"temperature": temperature, "ddm_weight": 0.0},
            {"view_0": golden.WEAK, "view_1": golden.KEYS},
            None,
            {"loss": value},
        )
        for temperature, value in (
            (0.1, 0.5199408107808241),
            (0.5, 2.325112340679897),
        )
    ],
    "byol": [
        (
            {"ddm_weight": 0.0, "queue_size": 0},
            {"view_0": golden.WEAK, "view_1": golden.STRONG},
            {"view_1": golden.KEYS, "view_0": golden.WEAK_2},
            {"loss": 0.07518338965968335},
        )
    ],
}


@pytest.mark.parametrize(
    "name, case",
    [(name, i) for name in GOLDEN for i in range(len(GOLDEN[name]))],
)
def test_losses_of_methods_equal_golden_values(name, case):
    changes, projections, targets, expected = GOLDEN[name][case]
    method = tiny.make(
        tiny.config(
            name,
            **dict(batch_size=4, projection_size=8)
            | ({"queue_size": 16} if name in ("moco", "clsa") else {})
            | changes,
        )
    )
    for queue in tiny.queues(method):
        queue.keys.assign(golden.QUEUE)
    projections, targets = (
        x and {k: tf.constant(v, tf.float32) for k, v in x.items()}
        for x in (projections, targets)
    )
    loss, reports = method.loss(
        projections, targets, {"example_ids": tf.range(4)}
    )
    assert loss.shape == [4]
    got = {"loss": loss} | reports
    for key, value in expected.items():
        assert np.mean(got[key]) == pytest.approx(value, abs=2e-6), key


@clsa_first
def test_export_and_keras_model_equal_the_encoder(name, tmp_path):
    config = tiny.config(name)
    method = tiny.make(config)
    tiny.fit(method, tiny.batches(config, 2))
    images = np.random.default_rng(0).integers(0, 256, [3, 16, 16, 3])
    expected = method.encoder.features_and_projections(np.uint8(images))
    served = ServedEncoder(method.encoder, image_size=16, crop_ratio=1.0)
    tf.saved_model.save(served, str(tmp_path), signatures=served.signatures)
    loaded = tf.saved_model.load(str(tmp_path))
    exported = loaded.signatures["images_uint8"](tf.constant(images, tf.uint8))
    model = functional.from_encoder(method.encoder, config)
    for found in (exported, model(np.float32(images))):
        for key, value in zip(("embedding", "projection"), expected):
            scale = np.max(np.abs(value))
            np.testing.assert_allclose(found[key], value, atol=1e-5 * scale)


@pytest.mark.slow
@every
def test_views_completed_on_the_device_give_equal_losses(name, tmp_path):
    """Also with the whole step compiled by XLA, as TPUs need it."""
    for i in range(20):
        image = pillow_chain.photograph(40, 37, seed=i)
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    source = open_source(f"folder:{tmp_path}", labels="none")

    def losses(place, compiled=False):
        method = tiny.make(
            tiny.config(name, backbone="one_block", augment_on=place)
        )
        method.compile(optimizer=method.optimizer, jit_compile=compiled)
        data = real_batches(source, method, completed=place == "host")
        return [report["loss"] for report in tiny.fit(method, data.take(2))]

    host = losses("host")
    np.testing.assert_allclose(losses("device"), host, rtol=1e-6)
    np.testing.assert_allclose(losses("device", True), host, rtol=1e-3)


@pytest.mark.slow
@every
def test_the_compiled_step_has_static_shapes(name):
    """A TPU needs augmentation, gradients and update as one program."""
    config = tiny.config(
        name, backbone="one_block", augment_on="device", accumulation_steps=2
    )
    method = tiny.make(config)
    batch = incomplete_batch(method, config)
    step = tf.function(method.train_step, jit_compile=True, autograph=False)
    program = step.experimental_get_compiler_ir(batch)(stage="hlo")
    assert "while" in program  # the micro-batches
    dynamic = re.findall(r"\[<=\d+", program)
    assert dynamic == []


def incomplete_batch(method, config):
    """A batch as the host passes it to an accelerator that augments."""
    batch = {}
    for view in method.views(config.options):
        if view.shuffle:
            batch[f"{view.name}_order"] = tf.range(config.batch_size)
        size = [config.batch_size, view.size, 3, view.size]
        batch[view.name] = tf.zeros(size, tf.uint8)
        batch[params_key(view)] = tf.ones(
            [config.batch_size, packed_width(view)]
        )
    return batch


def test_collapse_is_measured_on_unit_projections_of_one_view():
    method = tiny.make(tiny.config("simclr"))
    rows = np.random.default_rng(0).normal(0, 9, [4, 16]).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for outputs in (tf.constant(rows), {"a": 0 * rows, "view_0": rows}):
        outputs = tf.nest.map_structure(tf.constant, outputs)
        found = method.collapse_projections(None, outputs)
        np.testing.assert_allclose(found, unit, rtol=1e-5)
    for outputs in ({"a": tf.constant(rows)}, {"view_0": tf.zeros([4])}):
        with pytest.raises(NotImplementedError, match="collapse_projections"):
            method.collapse_projections(None, outputs)


@pytest.mark.parametrize("rows", [8, 4])
def test_own_rows_of_a_micro_batch(rows):
    """Of the global batch of two replicas, and of the second one's batch."""
    batch = tf.range(8)[-rows:, tf.newaxis]
    own = base.own_rows(batch, tf.constant([6, 7]))
    np.testing.assert_array_equal(own, [[6], [7]])


@clsa_first
def test_accumulated_step_equals_that_of_the_whole_batch(name):
    """Two micro-batches; parts of the batch have their own statistics."""
    found = []
    for parts in (1, 2):
        config = tiny.config(
            name,
            batch_norm="split",
            batch_norm_splits=4,
            accumulation_steps=parts,
            base_lr=0.03,
        )
        method = tiny.make(config)
        reports = tiny.fit(method, tiny.batches(config, 3))
        found.append((reports, method))
    (whole, one), (accumulated, two) = found
    for a, b in zip(whole, accumulated):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
    compared = [
        (v, w)
        for v, w in zip(one.variables, two.variables)
        if "moving_" not in v.name
    ]
    compared += zip(one.optimizer.variables, two.optimizer.variables)
    for queues in zip(tiny.queues(one), tiny.queues(two)):
        compared += zip(*(queue.variables for queue in queues))
    for v, w in compared:
        scale = np.max(np.abs(v.numpy()), initial=0.0)
        np.testing.assert_allclose(w, v, atol=1e-4 * scale, err_msg=v.name)
