"""CLSA beyond what every method has to fulfil."""

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.options import Crop
from tests import golden, tiny

CROPS = dict(
    query_crops=(Crop(16, 0.2, 1.0), Crop(12, 0.1, 0.8)),
    strong_crops=(Crop(16, 0.2, 1.0), Crop(12, 0.1, 0.8)),
)


def test_multi_crop_golden_through_the_method():
    method = tiny.make(
        tiny.config(batch_size=4, queue_size=16, projection_size=8, **CROPS)
    )
    tables = {
        "query_": [golden.WEAK, golden.WEAK_2],
        "strong_": [golden.STRONG, golden.STRONG_2],
    }
    method.project_all = lambda batch, prefix: [
        tf.constant(table, tf.float32) for table in tables[prefix]
    ]
    method.queue.keys.assign(golden.QUEUE)
    loss, reports = method.objective(
        {"rows": tf.range(4)}, tf.constant(golden.KEYS, tf.float32)
    )
    contrast, ddm = 3.111127388865267, 9.124925626665206
    assert np.mean(reports["contrast"]) == pytest.approx(contrast, abs=1e-5)
    assert np.mean(reports["ddm"]) == pytest.approx(ddm, abs=1e-5)
    assert np.mean(loss) == pytest.approx(contrast + ddm, abs=1e-5)


def test_multi_crop_trains_with_crops_of_several_sizes():
    config = tiny.config(**CROPS)
    method = tiny.make(config)
    (report,) = tiny.fit(method, tiny.batches(config, 1))
    assert report["loss"] == pytest.approx(
        report["contrast"] + report["ddm"], rel=1e-5
    )
    assert 0 <= report["ddm_kl"] < report["ddm"]
