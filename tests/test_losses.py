import numpy as np
import pytest
import tensorflow as tf

from clsa_tf import losses
from tests import golden as g


def similarities(rows, columns=g.CANDIDATES):
    return losses.cosines(tf.constant(rows), tf.constant(columns))


def mean(x):
    return float(tf.reduce_mean(x))


def naive_log_softmax(row):
    """One row, one column at a time, as the formula is written."""
    total = sum(np.exp(x) for x in row)
    return np.array([x - np.log(total) for x in row])


def test_clsa_contrast_golden():
    loss = losses.info_nce(similarities(g.WEAK), tf.range(4), temperature=0.2)
    assert loss.shape == [4]
    assert mean(loss) == pytest.approx(1.5625960440085418, abs=1e-12)


def test_moco_contrast_golden():
    own = np.sum(g.WEAK * g.KEYS, axis=1, keepdims=True)
    logits = tf.concat([own, g.WEAK @ g.QUEUE.T], axis=1)
    loss = losses.info_nce(logits, tf.zeros([4], tf.int32), temperature=0.2)
    assert mean(loss) == pytest.approx(1.4571956530113974, abs=1e-12)


@pytest.mark.parametrize(
    "temperature, value, entropy",
    [
        (0.2, 2.1969500206905180, 2.0102952654622930),
        (0.5, 2.5718498358692754, 2.5133294113795963),
    ],
)
def test_ddm_golden(temperature, value, entropy):
    weak, strong = [similarities(g.WEAK)], [similarities(g.STRONG)]
    loss = losses.ddm(weak, strong, temperature=temperature)
    assert loss.shape == [4]
    assert mean(loss) == pytest.approx(value, abs=1e-12)
    floor = losses.teacher_entropy(weak, temperature=temperature)
    assert mean(floor) == pytest.approx(entropy, abs=1e-12)


def test_multi_crop_golden_is_a_sum_over_crops_and_pairs():
    weak = [similarities(g.WEAK), similarities(g.WEAK_2)]
    strong = [similarities(g.STRONG), similarities(g.STRONG_2)]
    contrast = sum(
        mean(losses.info_nce(w, tf.range(4), temperature=0.2)) for w in weak
    )
    assert contrast == pytest.approx(3.111127388865267, abs=1e-12)
    ddm = mean(losses.ddm(weak, strong, temperature=0.2))
    assert ddm == pytest.approx(9.124925626665206, abs=1e-12)


def test_ddm_equals_the_formula_pair_by_pair():
    rng = np.random.default_rng(1)
    weak = rng.uniform(-1, 1, [3, 5, 7])
    strong = rng.uniform(-1, 1, [2, 5, 7])
    expected = np.zeros(5)
    for row in range(5):
        for w in weak[:, row]:
            teacher = np.exp(naive_log_softmax(w / 0.3))
            for s in strong[:, row]:
                expected[row] -= teacher @ naive_log_softmax(s / 0.3)
    loss = losses.ddm(
        tf.unstack(tf.constant(weak)),
        tf.unstack(tf.constant(strong)),
        temperature=0.3,
    )
    np.testing.assert_allclose(loss, expected, atol=1e-12)


def test_ddm_gradient_flows_into_the_strong_view_only():
    weak = tf.Variable(similarities(g.WEAK))
    strong = tf.Variable(similarities(g.STRONG))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(losses.ddm([weak], [strong], temperature=0.5))
    to_weak, to_strong = tape.gradient(loss, [weak, strong])
    assert to_weak is None
    # (r - t) / (T N), the closed form.
    expected = tf.nn.softmax(strong / 0.5) - tf.nn.softmax(weak / 0.5)
    np.testing.assert_allclose(to_strong, expected / 0.5 / 4, atol=1e-12)


def test_uniform_similarities_cost_log_of_candidates():
    flat = tf.fill([3, 10], 0.4)
    loss = losses.info_nce(flat, tf.constant([0, 5, 9]), temperature=0.2)
    np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)
    ddm = losses.ddm([flat], [flat], temperature=0.2)
    np.testing.assert_allclose(ddm, np.log(10), rtol=1e-6)
    entropy = losses.teacher_entropy([flat], temperature=0.2)
    np.testing.assert_allclose(entropy, np.log(10), rtol=1e-6)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32])
def test_finite_at_extreme_similarities_in_low_precision(dtype):
    x = tf.cast(np.where(np.eye(4, 70_000), 1.0, -1.0), dtype)
    strong = tf.Variable(-x)
    with tf.GradientTape() as tape:
        loss = losses.ddm([x], [strong], temperature=0.02)
        loss += losses.info_nce(strong, tf.range(4), temperature=0.02)
    assert loss.dtype == tf.float32
    assert np.isfinite(loss).all()
    assert np.isfinite(tf.cast(tape.gradient(loss, strong), tf.float32)).all()
