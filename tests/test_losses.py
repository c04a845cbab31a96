import numpy as np
import pytest
import tensorflow as tf

from clsa_tf import losses
from clsa_tf.evaluation import knn
from clsa_tf.losses import products
from clsa_tf.losses.contrast import top1
from clsa_tf.methods import statistics
from tests import golden as g


def similarities(rows, columns=g.CANDIDATES):
    return losses.cosines(tf.constant(rows), tf.constant(columns))


def mean(x):
    return float(tf.reduce_mean(x))


def naive_log_softmax(row):
    """The formula for one row, one column at a time."""
    total = sum(np.exp(x) for x in row)
    return np.array([x - np.log(total) for x in row])


def test_clsa_contrast_equals_the_golden_value():
    loss = losses.info_nce(similarities(g.WEAK), tf.range(4), temperature=0.2)
    assert loss.shape == [4]
    assert mean(loss) == pytest.approx(1.5625960440085418, abs=1e-12)


def test_moco_contrast_equals_the_golden_value():
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
def test_ddm_equals_golden_values(temperature, value, entropy):
    weak, strong = [similarities(g.WEAK)], [similarities(g.STRONG)]
    loss = losses.ddm(weak, strong, temperature=temperature)
    assert loss.shape == [4]
    assert mean(loss) == pytest.approx(value, abs=1e-12)
    floor = losses.teacher_entropy(weak, temperature=temperature)
    assert mean(floor) == pytest.approx(entropy, abs=1e-12)


def test_multi_crop_golden_values_are_sums_over_crops_and_pairs():
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
def test_losses_are_finite_at_extreme_similarities_in_low_precision(dtype):
    x = tf.cast(np.where(np.eye(4, 70_000), 1.0, -1.0), dtype)
    strong = tf.Variable(-x)
    with tf.GradientTape() as tape:
        loss = losses.ddm([x], [strong], temperature=0.02)
        loss += losses.info_nce(strong, tf.range(4), temperature=0.02)
    assert loss.dtype == tf.float32
    assert np.isfinite(loss).all()
    assert np.isfinite(tf.cast(tape.gradient(loss, strong), tf.float32)).all()


@pytest.mark.parametrize(
    "temperature, value", [(0.1, 0.5199408107808241), (0.5, 2.325112340679897)]
)
def test_simclr_golden_values_are_sums_over_both_directions(temperature, value):
    def direction(a, b):
        a, b = tf.constant(a), tf.constant(b)
        return losses.nt_xent(a, b, a, tf.range(4), temperature=temperature)

    loss = direction(g.WEAK, g.KEYS) + direction(g.KEYS, g.WEAK)
    assert loss.shape == [4]
    assert mean(loss) == pytest.approx(value, abs=1e-12)


def nt_xent_loop(queries, positives, others, example_ids, temperature):
    def e(x, y):
        return np.exp(x @ y / temperature)

    losses_of_rows = []
    for q, own in zip(queries, example_ids):
        total = sum(e(q, p) for p in positives)
        total += sum(e(q, o) for j, o in enumerate(others) if j != own)
        losses_of_rows.append(-np.log(e(q, positives[own]) / total))
    return np.array(losses_of_rows)


def test_nt_xent_equals_the_formula_term_by_term():
    queries, example_ids = g.unit_rows(1, 3, 6), tf.constant([4, 0, 2])
    positives, others = g.unit_rows(2, 2, 5, 6)
    loss = losses.nt_xent(
        *map(tf.constant, (queries, positives, others)),
        example_ids,
        temperature=0.3,
    )
    expected = nt_xent_loop(
        queries, positives, others, example_ids.numpy(), 0.3
    )
    np.testing.assert_allclose(loss, expected, atol=1e-12)


def test_nt_xent_gradient_flows_into_all_except_the_own_other_row():
    queries = g.unit_rows(1, 1, 6)
    positives, others = g.unit_rows(2, 2, 5, 6)
    tensors = [tf.Variable(x) for x in (queries, positives, others)]
    with tf.GradientTape() as tape:
        loss = losses.nt_xent(*tensors, tf.constant([3]), temperature=0.3)
    gradients = [x.numpy() for x in tape.gradient(loss, tensors)]
    for which, gradient in enumerate(gradients):
        for index in np.ndindex(*gradient.shape):
            slopes = []
            for step in (1e-6, -1e-6):
                moved = [queries.copy(), positives.copy(), others.copy()]
                moved[which][index] += step
                slopes.append(nt_xent_loop(*moved, [3], 0.3)[0])
            slope = (slopes[0] - slopes[1]) / 2e-6
            assert gradient[index] == pytest.approx(slope, abs=1e-8)
    assert not gradients[2][3].any()


def test_nt_xent_ignores_the_own_row_of_others():
    queries, positives, others = g.unit_rows(1, 3, 4, 8)
    changed = others.copy()
    changed[2] = g.unit_rows(2, 8)

    def loss(others):
        tensors = map(tf.constant, (queries, positives, others))
        return losses.nt_xent(*tensors, tf.range(4), temperature=0.2).numpy()

    assert loss(changed)[2] == loss(others)[2]
    assert (np.delete(loss(changed) - loss(others), 2) != 0).all()


def test_nt_xent_of_parts_of_the_batch_equals_that_of_the_whole():
    queries, positives, others = map(tf.constant, g.unit_rows(1, 3, 4, 8))

    def loss(first, last):
        return losses.nt_xent(
            queries[first:last],
            positives,
            others,
            tf.range(first, last),
            temperature=0.2,
        )

    parts = tf.concat([loss(0, 2), loss(2, 4)], 0)
    np.testing.assert_allclose(parts, loss(0, 4), rtol=1e-14)


def test_nt_xent_is_finite_for_equal_rows_and_low_temperatures():
    for images in (4, 1):  # with one image, no row of `others` is left
        x, example_ids = tf.Variable([[1.0, 0.0]] * images), tf.range(images)
        with tf.GradientTape() as tape:
            loss = losses.nt_xent(x, x, x, example_ids, temperature=0.01)
        np.testing.assert_allclose(loss, np.log(2 * images - 1), atol=1e-5)
        assert np.isfinite(tape.gradient(loss, x)).all()


def test_byol_golden_value_is_a_sum_over_both_directions():
    loss = losses.regression(tf.constant(g.WEAK), tf.constant(g.KEYS))
    assert loss.shape == [4]
    loss += losses.regression(tf.constant(g.STRONG), tf.constant(g.WEAK_2))
    assert mean(loss) == pytest.approx(0.07518338965968335, abs=1e-12)


def test_regression_is_the_squared_distance_to_a_constant():
    predictions, targets = map(tf.Variable, g.unit_rows(1, 2, 5, 8))
    with tf.GradientTape() as tape:
        loss = losses.regression(predictions, targets)
    expected = [
        sum((a - b) ** 2 for a, b in zip(p, t))
        for p, t in zip(predictions.numpy(), targets.numpy())
    ]
    np.testing.assert_allclose(loss, expected, atol=1e-12)
    slope, into_targets = tape.gradient(loss, [predictions, targets])
    np.testing.assert_allclose(slope, -2 * targets, atol=1e-12)
    assert into_targets is None


def test_looc_golden_values_are_contrasts_per_head():
    heads = []
    for head, (queries, queue) in enumerate(zip(g.LOOC_QUERIES, g.LOOC_QUEUES)):
        # The other views' keys are negatives, except for head 0.
        keys = g.LOOC_KEYS[head] if head else g.LOOC_KEYS[0][:1]
        own = [tf.einsum("nd,nd->n", queries, x)[:, tf.newaxis] for x in keys]
        candidates = tf.concat([*own, similarities(queries, queue)], 1)
        loss = losses.info_nce(candidates, tf.fill([4], head), temperature=0.2)
        heads.append(mean(loss))
    assert heads == pytest.approx(
        [1.4571956530113974, 1.945528610617122, 2.3370874057151045], abs=1e-12
    )
    assert np.mean(heads) == pytest.approx(1.9132705564478745, abs=1e-12)


def tf32(x):
    """Rounds to 10 bits of mantissa, the best that tensor cores do."""
    bits = np.float32(x).view(np.int32)
    return ((bits + 2**12) & -(2**13)).view(np.float32)


@pytest.fixture
def tensor_cores(monkeypatch):
    """Rounds the factors of matrix products to TF32."""
    matmul = tf.matmul

    def tensor_core_matmul(a, b, **options):
        return matmul(
            *(tf.constant(tf32(x.numpy())) for x in (a, b)), **options
        )

    monkeypatch.setattr(products, "_tf32_is_used", lambda: True)
    monkeypatch.setattr(tf, "matmul", tensor_core_matmul)


def test_products_are_float32_though_factors_are_rounded_to_tf32(tensor_cores):
    one, two = (np.float32(x) for x in g.unit_rows(1, 2, 64, 128))
    exact = np.float64(one) @ np.float64(two).T
    rounded = np.abs(tf32(one) @ tf32(two).T - exact).max()
    found = np.abs(losses.cosines(tf.constant(one), tf.constant(two)) - exact)
    assert found.max() < 1e-6 < 1e-5 < rounded


def test_evaluations_are_float32_though_factors_are_rounded_to_tf32(
    tensor_cores,
):
    """The cosines of kNN, and the measures of a collapse."""
    one, two = (np.float32(x) for x in g.unit_rows(1, 2, 64, 128))
    cosines, _ = knn.neighbours(one, two, k=64)
    exact = np.sort(np.float64(two) @ np.float64(one).T)[:, ::-1]
    np.testing.assert_allclose(cosines, exact, atol=1e-6)
    distances = np.square(np.float64(one)[:, None] - one).sum(axis=-1)
    found = statistics._squared_distances(tf.constant(one))
    np.testing.assert_allclose(found, distances, atol=2e-6)
    covariance = np.cov(np.float64(one), rowvar=False)
    spread = statistics.measures(tf.constant(one))["spread"]
    assert float(spread) == pytest.approx(np.trace(covariance), rel=1e-6)


def test_gradients_of_split_products_equal_those_of_products():
    one, two = (
        tf.Variable(x, dtype=tf.float32) for x in g.unit_rows(1, 2, 6, 8)
    )
    weights = tf.constant(g.unit_rows(2, 6, 6), tf.float32)
    gradients = []
    for function in (
        products.split_product,
        lambda a, b: tf.matmul(a, b, transpose_b=True),
    ):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(weights * function(one, two) ** 2)
        gradients.append(tape.gradient(loss, [one, two]))
    for mine, plain in zip(*gradients):
        np.testing.assert_allclose(mine, plain, atol=1e-6)


def test_a_tie_is_a_miss():
    """The accuracy of identical projections is 0."""
    same = tf.ones([3, 5])
    positive = tf.constant([0, 2, 4])
    np.testing.assert_array_equal(top1(same, positive), [0, 0, 0])
    almost = tf.constant(1.0 + np.float32(2.0**-23) * np.eye(5)[:3])
    np.testing.assert_array_equal(top1(almost, tf.range(3)), [0, 0, 0])
    better = same + 0.1 * tf.one_hot(positive, 5)
    np.testing.assert_array_equal(top1(better, positive), [1, 1, 1])
    np.testing.assert_array_equal(top1(same * np.nan, positive), [0, 0, 0])
