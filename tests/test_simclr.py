"""Properties of SimCLR beyond those of every method."""

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.errors import UserError
from clsa_tf.methods import simclr
from clsa_tf.options.fields import Crop
from tests import golden, tiny
from tests.ddm_oracle import ddm


def mean_loss(projections, **changes):
    settings = dict(batch_size=4, projection_size=8, temperature=0.5)
    method = tiny.make(tiny.config("simclr", **settings | changes))
    loss, reports = method.loss(
        {k: tf.constant(x, tf.float32) for k, x in projections.items()},
        None,
        {"example_ids": tf.range(4)},
    )
    return np.mean(loss), {k: np.mean(v) for k, v in reports.items()}


VIEWS = {"view_0": golden.WEAK, "view_1": golden.KEYS}
CONTRAST = 2.325112340679897  # published, T = 0.5


def test_divergence_adds_to_the_contrast():
    loss, reports = mean_loss(
        VIEWS | {"strong_0": golden.STRONG},
        ddm_weight=0.5,
        ddm_temperature=0.3,
    )
    expected = ddm(golden.WEAK, golden.STRONG, golden.KEYS, 0.3)
    assert reports["ddm"] == pytest.approx(expected, abs=2e-6)
    assert reports["contrast"] == pytest.approx(CONTRAST, abs=2e-6)
    assert loss == pytest.approx(CONTRAST + 0.5 * expected, abs=2e-6)


def test_the_divergence_has_gradients_for_strong_views_only():
    method = tiny.make(tiny.config("simclr", batch_size=4, projection_size=8))
    x = {
        name: tf.Variable(rows, dtype=tf.float32)
        for name, rows in (VIEWS | {"strong_0": golden.STRONG}).items()
    }
    with tf.GradientTape() as tape:
        found = {k: tf.convert_to_tensor(v) for k, v in x.items()}
        _, reports = method.loss(found, None, {"example_ids": tf.range(4)})
        loss = tf.reduce_sum(reports["ddm"])
    gradients = tape.gradient(loss, x)
    assert gradients["view_0"] is None or not np.any(gradients["view_0"])
    assert gradients["view_1"] is None or not np.any(gradients["view_1"])
    assert np.any(gradients["strong_0"])


def test_local_crops_are_compared_with_both_views():
    """Equals, in NumPy, cross-entropy over the other images' views."""
    local = golden.STRONG
    loss, _ = mean_loss(
        VIEWS | {"view_2": local},
        ddm_weight=0.0,
        local_crops=(Crop(12, 0.1, 0.5),),
        over_crops="sum",
    )
    expected = CONTRAST
    for own, other in ((golden.WEAK, golden.KEYS), (golden.KEYS, golden.WEAK)):
        for i in range(4):
            others = np.delete(other, i, axis=0)
            logits = np.concatenate([own, others]) @ local[i] / 0.5
            expected += (np.log(np.exp(logits).sum()) - logits[i]) / 4
    assert loss == pytest.approx(expected, abs=2e-6)


def test_local_crops_train():
    config = tiny.config("simclr", local_crops=(Crop(12, 0.1, 0.5),) * 2)
    reports = tiny.fit(tiny.make(config), tiny.batches(config, 2))
    assert np.isfinite(reports[-1]["loss"])


def test_versions_differ_in_the_depth_of_the_head():
    for layers in (2, 3):
        method = tiny.make(tiny.config("simclr", projection_layers=layers))
        kernels = [v for v in method.encoder.heads[0].variables]
        assert sum("kernel" in v.name for v in kernels) == layers


def test_a_momentum_teacher_is_rejected():
    with pytest.raises(UserError, match="--ddm_teacher=online"):
        simclr.check(tiny.config("simclr", ddm_teacher="momentum"))
