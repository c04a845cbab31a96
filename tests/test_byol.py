"""Properties of BYOL beyond those of every method."""

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.errors import UserError
from clsa_tf.methods import byol
from clsa_tf.methods.base import RunInfo
from clsa_tf.options.fields import Crop
from tests import golden, tiny
from tests.ddm_oracle import ddm

PROJECTIONS = {
    "view_0": golden.WEAK,
    "view_1": golden.STRONG,
    "strong_0": golden.STRONG_2,
}
TARGETS = {"view_1": golden.KEYS, "view_0": golden.WEAK_2}


def mean_loss(projections, queue=True, **changes):
    settings = dict(
        batch_size=4, projection_size=8, queue_size=16 if queue else 0
    )
    method = tiny.make(tiny.config("byol", **settings | changes))
    if queue:
        method.queue.keys.assign(golden.QUEUE)
    loss, reports = method.loss(
        *tf.nest.map_structure(
            lambda x: tf.constant(x, tf.float32), (projections, TARGETS)
        ),
        {"example_ids": tf.range(4)},
    )
    return np.mean(loss), {k: np.mean(v) for k, v in reports.items()}


@pytest.mark.parametrize("queue", [True, False])
@pytest.mark.parametrize("teacher", ["online", "momentum"])
def test_divergence_adds_to_the_prediction_loss(teacher, queue):
    loss, reports = mean_loss(PROJECTIONS, queue, ddm_teacher=teacher)
    candidates = golden.KEYS
    if queue:
        candidates = golden.CANDIDATES
    rows = {"online": golden.WEAK, "momentum": golden.WEAK_2}[teacher]
    expected = ddm(rows, golden.STRONG_2, candidates, 0.2)
    assert reports["ddm"] == pytest.approx(expected, abs=2e-6)
    assert reports["contrast"] == pytest.approx(0.07518338965968335, abs=2e-6)
    assert loss == pytest.approx(expected + 0.07518338965968335, abs=2e-6)


def test_momentum_rises_along_half_a_cosine():
    config = tiny.config(
        "byol", key_momentum=0.996, key_momentum_schedule="cosine"
    )
    method = byol.BYOL(config, RunInfo(total_steps=400))
    golden_values = (0.996, 0.9965857864376269, 0.998, 0.9994142135623731, 1.0)
    for step, value in zip((0, 100, 200, 300, 400), golden_values):
        method.steps_taken.assign(step)
        assert float(method.momentum()) == pytest.approx(value, abs=1e-7)


def test_predictor_is_learned_and_not_averaged():
    method = tiny.make(tiny.config("byol", ddm_weight=0.0, queue_size=0))
    learned = {v.ref() for v in method.learned}
    assert {v.ref() for v in method.predictor.trainable_variables} < learned
    # The momentum encoder has no predictor.
    assert len(method.momentum_encoder.trainable_variables) == len(
        method.encoder.trainable_variables
    )


def test_views_are_asymmetric():
    one, two = byol.BYOL.views(tiny.config("byol", ddm_weight=0.0).options)
    assert (one.blur, two.blur) == (1.0, 0.1)
    assert (one.solarize, two.solarize) == (0.0, 0.2)
    assert one.jitter == two.jitter == (0.4, 0.4, 0.2, 0.1)


def test_local_crops_predict_both_targets():
    loss, _ = mean_loss(
        PROJECTIONS | {"view_2": golden.KEYS},
        ddm_weight=0.0,
        queue_size=0,
        queue=False,
        local_crops=(Crop(12, 0.1, 0.5),),
        over_crops="sum",
    )
    local = 2 - 2 * np.mean(np.sum(golden.KEYS * golden.WEAK_2, axis=1))
    assert loss == pytest.approx(0.07518338965968335 + local, abs=2e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(queue_size=40, ddm_weight=0.0), ["--queue_size=0", "40"]),
        (dict(queue_size=8), ["at least 16", "=8"]),
        (dict(view_blur=(1.0,)), ["two probabilities", "--view_blur"]),
        (dict(view_solarize=(0.0, 2.0)), ["--view_solarize", "0.0,2.0"]),
    ],
)
def test_inconsistent_options_are_rejected(changes, words):
    with pytest.raises(UserError) as error:
        byol.check(tiny.config("byol", **changes))
    for word in words:
        assert word in str(error.value)
