"""Properties of CLSA beyond those of every method."""

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.errors import UserError
from clsa_tf.methods import clsa
from clsa_tf.options.fields import Crop
from tests import golden, tiny
from tests.ddm_oracle import ddm

CROPS = dict(
    query_crops=(Crop(16, 0.2, 1.0), Crop(12, 0.1, 0.8)),
    strong_crops=(Crop(16, 0.2, 1.0), Crop(12, 0.1, 0.8)),
)
PROJECTIONS = {
    "query_0": golden.WEAK,
    "query_1": golden.WEAK_2,
    "strong_0": golden.STRONG,
    "strong_1": golden.STRONG_2,
}
# The published loss of two weak and two strong views.
CONTRAST, DDM = 3.111127388865267, 9.124925626665206


def mean_loss(projections, targets, **changes):
    """Mean loss and reports of the golden tensors."""
    method = tiny.make(
        tiny.config(batch_size=4, queue_size=16, projection_size=8, **changes)
    )
    method.queue.keys.assign(golden.QUEUE)
    loss, reports = method.loss(
        *tf.nest.map_structure(
            lambda x: tf.constant(x, tf.float32), (projections, targets)
        ),
        {"example_ids": tf.range(4)},
    )
    return np.mean(loss), {k: np.mean(v) for k, v in reports.items()}


def test_multi_crop_loss_equals_golden_values():
    loss, reports = mean_loss(PROJECTIONS, {"key": golden.KEYS}, **CROPS)
    assert reports["contrast"] == pytest.approx(CONTRAST, abs=1e-5)
    assert reports["ddm"] == pytest.approx(DDM, abs=1e-5)
    assert loss == pytest.approx(CONTRAST + DDM, abs=1e-5)


def test_crop_reduction_mean_divides_by_the_number_of_terms():
    loss, reports = mean_loss(
        PROJECTIONS, {"key": golden.KEYS}, over_crops="mean", **CROPS
    )
    assert reports["contrast"] == pytest.approx(CONTRAST / 2, abs=1e-5)
    assert reports["ddm"] == pytest.approx(DDM / 4, abs=1e-5)
    assert loss == pytest.approx(CONTRAST / 2 + DDM / 4, abs=1e-5)


def test_multi_crop_trains_with_crops_of_several_sizes():
    config = tiny.config(**CROPS)
    method = tiny.make(config)
    (report,) = tiny.fit(method, tiny.batches(config, 1))
    assert report["loss"] == pytest.approx(
        report["contrast"] + report["ddm"], rel=1e-5
    )
    assert 0 <= report["ddm_kl"] < report["ddm"]


def test_clsa_without_divergence_and_inbatch_negatives_is_moco_v2():
    """Loss, weights and queue of three steps are equal."""
    found = []
    for name, changes in (
        ("moco", {}),
        ("clsa", dict(ddm_weight=0.0, inbatch_negatives=False)),
    ):
        method = tiny.make(tiny.config(name, **changes))
        reports = tiny.fit(method, tiny.batches(method.config, 3))
        found.append((reports, method))
    (moco_reports, moco), (clsa_reports, method) = found
    assert clsa_reports == moco_reports
    for one, two in zip(moco.variables, method.variables):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(moco.queue.keys, method.queue.keys)


def test_without_inbatch_negatives_candidates_are_own_key_and_queue():
    projections = {"query_0": golden.WEAK, "strong_0": golden.STRONG}
    _, reports = mean_loss(
        projections, {"key": golden.KEYS}, inbatch_negatives=False
    )
    assert reports["contrast"] == pytest.approx(1.4571956530113974, abs=2e-6)
    expected = np.mean(
        [
            ddm(
                golden.WEAK[i : i + 1],
                golden.STRONG[i : i + 1],
                np.concatenate([golden.KEYS[i : i + 1], golden.QUEUE]),
                0.2,
            )
            for i in range(4)
        ]
    )
    assert reports["ddm"] == pytest.approx(expected, abs=2e-6)


def test_momentum_teacher_enters_the_divergence_only():
    projections = {"query_0": golden.WEAK, "strong_0": golden.STRONG}
    targets = {"key": golden.KEYS, "query_0": golden.WEAK_2}
    _, reports = mean_loss(projections, targets, ddm_teacher="momentum")
    expected = ddm(golden.WEAK_2, golden.STRONG, golden.CANDIDATES, 0.2)
    assert reports["ddm"] == pytest.approx(expected, abs=2e-6)
    assert reports["contrast"] == pytest.approx(1.5625960440085418, abs=2e-6)


def test_momentum_encoder_projects_the_weak_view_for_the_teacher():
    method = tiny.make(tiny.config(ddm_teacher="momentum", batch_norm="sync"))
    batch = next(iter(tiny.batches(method.config, 1)))
    batch = method._complete(batch)
    targets = method.targets(batch)
    assert list(targets) == ["key", "query_0"]
    expected = method.momentum_encoder.project(batch["query_0"], training=True)
    np.testing.assert_allclose(targets["query_0"], expected, atol=1e-5)


def test_strong_views_used_naively_are_ordinary_queries():
    projections = {"query_0": golden.WEAK, "strong_0": golden.STRONG}
    loss, reports = mean_loss(
        projections, {"key": golden.KEYS}, ddm_weight=0.0, strong_contrast=True
    )
    alone = [
        mean_loss({"query_0": x}, {"key": golden.KEYS}, ddm_weight=0.0)[0]
        for x in (golden.WEAK, golden.STRONG)
    ]
    assert loss == pytest.approx(sum(alone), abs=2e-6)
    assert "ddm" not in reports


def test_unused_strong_views_are_not_made():
    options = tiny.config(ddm_weight=0.0).options
    names = [view.name for view in clsa.CLSA.views(options)]
    assert names == ["key", "query_0"]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(strong_crops=()), ["--strong_crops", "--ddm_weight=1"]),
        (
            dict(strong_crops=(), ddm_weight=0.0, strong_contrast=True),
            ["--strong_contrast", "--strong_crops"],
        ),
        (dict(symmetric=True, queue_size=31), ["at least 32", "=31"]),
        (dict(query_crops=()), ["--query_crops", "224:0.2:1"]),
    ],
)
def test_inconsistent_options_are_rejected(changes, words):
    with pytest.raises(UserError) as error:
        clsa.check(tiny.config(**changes))
    for word in words:
        assert word in str(error.value)
