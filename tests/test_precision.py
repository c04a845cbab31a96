import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras

from clsa_tf.cli import launch
from clsa_tf.networks import precision
from clsa_tf.networks.encoder import make_encoder
from clsa_tf.optimizers import optimizers
from clsa_tf.options.fields import Crop
from tests import replicas, runs, tiny
from tests.marks import slow_but

SMALL = dict(
    key_crop=Crop(8, 0.2, 1.0),
    query_crops=(Crop(8, 0.2, 1.0),),
    strong_crops=(Crop(8, 0.1, 0.6),),
)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"avx2", "avx512_bf16"}, "mixed_bfloat16"),
        ({"amx_bf16"}, "mixed_bfloat16"),
        ({"avx2", "avx512f"}, "float32"),
    ],
)
def test_auto_depends_on_the_processor(monkeypatch, flags, expected):
    monkeypatch.setattr(precision, "_cpu_flags", lambda: flags)
    assert precision.resolve("auto") == expected
    assert precision.resolve("mixed_float16") == "mixed_float16"


@pytest.mark.parametrize(
    "capability, expected", [((8, 0), "mixed_bfloat16"), ((7, 5), "float32")]
)
def test_auto_depends_on_the_gpu(monkeypatch, capability, expected):
    config = tf.config
    monkeypatch.setattr(config, "list_physical_devices", lambda kind: [kind])
    monkeypatch.setattr(
        config.experimental,
        "get_device_details",
        lambda _: {"compute_capability": capability},
    )
    assert precision.resolve("auto") == expected


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_only_convolutions_have_low_precision(policy):
    encoder = make_encoder(tiny.config(), name="encoder", precision=policy)
    low = tf.as_dtype(policy.removeprefix("mixed_"))
    layers = encoder.backbone.layers
    computes = {type(x).__name__: x.compute_dtype for x in layers}
    assert computes["Conv2D"] == computes["ReLU"] == low.name
    assert computes["GlobalAveragePooling2D"] == "float32"
    assert {x.compute_dtype for x in encoder.heads[0].layers} == {"float32"}
    assert {v.dtype for v in encoder.variables} == {tf.float32}
    images = tf.zeros([2, 8, 8, 3], tf.uint8)
    assert encoder(images, training=True).dtype == tf.float32
    assert encoder.project(images).dtype == tf.float32


@pytest.mark.parametrize("kind", slow_but(1, ["split", "sync", "local"]))
def test_bfloat16_trains_like_float32(kind):
    """Running statistics stay in float32."""
    found = {}
    for policy in ("float32", "mixed_bfloat16"):
        config = tiny.config(
            precision=policy, batch_norm=kind, batch_norm_splits=2, base_lr=0.01
        )
        method = tiny.make(config)
        reports = tiny.fit(method, tiny.batches(config, 3))
        found[policy] = [r["loss"] for r in reports], method
    losses, method = found["mixed_bfloat16"]
    expected, reference = found["float32"]
    # 8 bits of mantissa: about 0.4 % per rounding.
    np.testing.assert_allclose(losses, expected, rtol=0.03)
    assert losses != expected
    for low, high in zip(method.variables, reference.variables):
        if "moving_mean" in low.name:
            scale = np.max(np.abs(high)) + 1e-3
            np.testing.assert_allclose(low, high, atol=0.1 * scale)


def scaled(**changes):
    method = tiny.make(
        tiny.config(precision="mixed_float16", **SMALL | changes)
    )
    assert isinstance(
        method.optimizer, keras.mixed_precision.LossScaleOptimizer
    )
    return method


def test_float16_steps_are_close_to_those_of_float32():
    """The gradients are divided by the loss scale, 32,768."""
    low = scaled(l2=0.0)
    high = tiny.make(tiny.config(**SMALL, l2=0.0))
    for method in (low, high):
        tiny.fit(method, tiny.batches(method.config, 1))
    moved = [
        np.concatenate(
            [
                np.ravel(v - start)
                for v, start in zip(
                    method.learned, tiny.make(high.config).learned
                )
            ]
        )
        for method in (low, high)
    ]
    cosine = np.dot(*moved) / np.prod(np.linalg.norm(moved, axis=1))
    assert cosine > 0.98
    ratio = np.linalg.norm(moved[0]) / np.linalg.norm(moved[1])
    assert ratio == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_float16_skips_a_step_whose_gradients_are_not_finite(optimizer):
    """Momentum encoder, queue and running statistics do not change either.

    The step counts, because the position in the data and the learning rate
    follow from the number of steps.
    """
    method = scaled(optimizer=optimizer)
    method.optimizer._loss_scale._current_loss_scale.assign(1e38)
    parts = [method.encoder, method.momentum_encoder, method.queue]
    state = [v for part in parts for v in part.variables]
    before = [v.numpy() for v in state]
    tiny.fit(method, tiny.batches(method.config, 1))
    for variable, old in zip(state, before):
        np.testing.assert_array_equal(variable, old, err_msg=variable.name)
    assert method.steps_taken == method.optimizer.iterations == 1
    assert float(method.optimizer.loss_scale) == pytest.approx(5e37)
    # The next step, with a suitable scale, changes all of them.
    method.optimizer._loss_scale._current_loss_scale.assign(1.0)
    tiny.fit(method, tiny.batches(method.config, 1, first=1))
    for variable, old in zip(state, before):
        if "bias" not in variable.name:
            assert np.any(variable != old), variable.name
    assert method.steps_taken == method.optimizer.iterations == 2


def skipped_step_on_two_replicas():
    """Returns the names of variables that a skipped step changes."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        method = scaled(batch_norm="sync")
        method.optimizer._loss_scale._current_loss_scale.assign(1e38)
    parts = [method.encoder, method.momentum_encoder, method.queue]
    state = [
        copy
        for part in parts
        for variable in part.variables
        for copy in strategy.experimental_local_results(variable)
    ]
    before = [v.numpy() for v in state]
    (batch,) = tiny.batches(method.config, 1).as_numpy_iterator()
    views = method.views(method.config.options)

    def of_worker(context):
        halves = replicas.share(batch, views, context)
        stacked = {k: np.stack([half[k] for half in halves]) for k in halves[0]}
        return tf.data.Dataset.from_tensor_slices(stacked)

    method.fit(
        strategy.distribute_datasets_from_function(of_worker),
        steps_per_epoch=1,
        verbose=0,
    )
    assert method.steps_taken == 1
    return [
        variable.name
        for variable, old in zip(state, before)
        if np.any(variable.numpy() != old)
    ]


@pytest.mark.slow
def test_float16_skips_a_step_on_all_replicas():
    assert runs.in_new_process(skipped_step_on_two_replicas) == []


def test_tf32_is_allowed_by_its_name_only():
    enabled = tf.config.experimental.tensor_float_32_execution_enabled
    before = enabled()
    try:
        for name in precision.TRAINING_PRECISIONS:
            precision.set_tf32(name)
            assert enabled() == (name == "tf32")
        assert precision.resolve("tf32") == "float32"
        launch._forbid_tf32()  # as every command does at its start
        assert not enabled()
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
