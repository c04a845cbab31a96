"""What every method has to fulfil; a new one is tested by its name alone."""

import re

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from benchmarks import pillow_chain
from clsa_tf import methods
from clsa_tf.augment.views import packed_width, params_key
from clsa_tf.checkpoint import Checkpoints
from clsa_tf.data.faults import Faults
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.sources import open_source
from tests import golden, tiny

pytestmark = pytest.mark.parametrize("name", methods.NAMES)


def arrays(variables):
    return [v.numpy().copy() for v in variables]


def assert_all_equal(one, two):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        np.testing.assert_array_equal(a, b)


def test_momentum_copy_equals_the_encoder_at_the_start(name):
    method = tiny.make(tiny.config(name))
    assert_all_equal(
        arrays(method.key_encoder.variables), arrays(method.encoder.variables)
    )


def test_gradients_reach_all_of_the_encoder_and_nothing_else(name):
    method = tiny.make(tiny.config(name, key_momentum=1.0, l2=0.0))
    before = arrays(method.learned), arrays(method.key_encoder.weights)
    keys = arrays(method.key_encoder.trainable_variables)
    tiny.fit(method, tiny.batches(method.config, 1))
    for variable, old in zip(method.learned, before[0]):
        assert not np.array_equal(variable, old), variable.name
    assert_all_equal(arrays(method.key_encoder.trainable_variables), keys)
    # ... whose batch normalisation does see the batch.
    assert not all(
        np.array_equal(v, old)
        for v, old in zip(method.key_encoder.weights, before[1])
    )
    assert {v.ref() for v in method.learned} == {
        v.ref() for v in method.encoder.trainable_variables
    }


def test_key_encoder_is_the_moving_average(name):
    method = tiny.make(tiny.config(name, key_momentum=0.75))
    keys = arrays(method.key_encoder.trainable_variables)
    tiny.fit(method, tiny.batches(method.config, 1))
    for key, old, query in zip(
        method.key_encoder.trainable_variables, keys, method.learned
    ):
        np.testing.assert_allclose(
            key, 0.75 * old + 0.25 * query, rtol=1e-5, atol=1e-7
        )


def test_queue_holds_the_keys_in_the_order_of_the_batch(name):
    config = tiny.config(name)
    method = tiny.make(config)
    batch = next(iter(tiny.batches(config, 1)))
    in_order = tf.gather(batch["key"], np.argsort(batch["key_rows"]))
    # Before the step the two encoders are equal, but for what they normalise:
    # batch statistics do not depend on the order of the rows.
    expected = method.encoder.project(in_order, training=True)
    tiny.fit(method, tiny.batches(config, 1))
    np.testing.assert_allclose(
        method.queue.keys[: tiny.ROWS], expected, atol=1e-5
    )
    assert method.queue.pointer == tiny.ROWS


def test_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    config = tiny.config(name)
    straight = tiny.make(config)
    expected = tiny.fit(straight, tiny.batches(config, 6))
    first = tiny.make(config)
    tiny.fit(first, tiny.batches(config, 3))
    Checkpoints(first, str(tmp_path), keep=1).save()
    second = tiny.make(config.replace(seed=9))  # nothing comes from the seed
    assert Checkpoints(second, str(tmp_path), keep=1).restore() == 3
    reports = tiny.fit(second, tiny.batches(config, 3, first=3))
    assert reports == expected[3:]
    assert_all_equal(arrays(second.variables), arrays(straight.variables))
    assert_all_equal(
        arrays(second.optimizer.variables), arrays(straight.optimizer.variables)
    )
    assert_all_equal(
        arrays(second.queue.variables), arrays(straight.queue.variables)
    )


def test_loss_falls_below_chance(name):
    config = tiny.config(name, queue_size=48, key_momentum=0.99)
    method = tiny.make(config)
    late = tiny.fit(method, tiny.batches(config, 100))[-10:]
    chance = type(method).useless(config)
    contrast = np.mean([r.get("contrast", r["loss"]) for r in late])
    assert contrast < 0.8 * chance
    assert np.mean([r["contrast_accuracy"] for r in late]) > 0.2


def test_objective_golden(name):
    """The golden values, through the method itself; a table is the encoder."""
    method = tiny.make(
        tiny.config(name, batch_size=4, queue_size=16, projection_size=8)
    )
    tables = {"query_": golden.WEAK, "strong_": golden.STRONG}
    method.project_all = lambda batch, prefix: [
        tf.constant(tables[prefix], tf.float32)
    ]
    method.queue.keys.assign(golden.QUEUE)
    per_example, reports = method.objective(
        {"rows": tf.range(4)}, tf.constant(golden.KEYS, tf.float32)
    )
    assert per_example.shape == [4]
    expected = {
        "moco": {"loss": 1.4571956530113974},
        "clsa": {
            "loss": 1.5625960440085418 + 2.1969500206905180,
            "contrast": 1.5625960440085418,
            "ddm": 2.1969500206905180,
            "ddm_kl": 0.18665475522822627,
        },
    }[name]
    got = {"loss": per_example} | reports
    for key, value in expected.items():
        assert np.mean(got[key]) == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("compiled", [False, True])
def test_views_finished_on_the_device_train_alike(name, compiled, tmp_path):
    """Also with the whole step compiled by XLA, as TPUs need it."""
    for i in range(20):
        image = pillow_chain.photograph(40, 37, seed=i)
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    source = open_source(f"folder:{tmp_path}", labels="none")
    losses = {}
    for place in ("host", "device"):
        config = tiny.config(name, augment_on=place)
        method = tiny.make(config)
        method.compile(
            optimizer=method.optimizer,
            jit_compile=compiled and place == "device",
        )
        data = training_batches(
            source,
            method.views(config.options),
            batch_size=config.batch_size,
            seed=1,
            start_step=0,
            faults=Faults(max_bad_share=0.0),
            finished=place == "host",
        )
        reports = tiny.fit(method, data.take(2))
        losses[place] = [report["loss"] for report in reports]
    np.testing.assert_allclose(
        losses["device"], losses["host"], rtol=1e-3 if compiled else 1e-6
    )


def test_the_compiled_step_has_static_shapes(name):
    """What a TPU needs: augmentation, gradients and update as one program."""
    config = tiny.config(name, augment_on="device", accumulation_steps=2)
    method = tiny.make(config)
    batch = unfinished(method, config)
    step = tf.function(method.train_step, jit_compile=True, autograph=False)
    program = step.experimental_get_compiler_ir(batch)(stage="hlo")
    assert "while" in program  # the micro-batches
    dynamic = re.findall(r"\[<=\d+", program)
    assert dynamic == []


def unfinished(method, config):
    """A batch as the host hands it to an accelerator that augments."""
    batch = {"key_rows": tf.range(config.batch_size)}
    for view in method.views(config.options):
        size = [config.batch_size, view.size, 3, view.size]
        batch[view.name] = tf.zeros(size, tf.uint8)
        batch[params_key(view)] = tf.ones(
            [config.batch_size, packed_width(view)]
        )
    return batch


def test_accumulated_step_equals_the_whole_one(name):
    """Gradients of two micro-batches, parts with statistics of their own."""
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
    compared += zip(one.queue.variables, two.queue.variables)
    for v, w in compared:
        scale = np.max(np.abs(v.numpy()), initial=0.0)
        np.testing.assert_allclose(w, v, atol=1e-4 * scale, err_msg=v.name)
