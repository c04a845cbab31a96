import itertools

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf import losses
from tests import cacr
from tests import golden as g


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def tensors(arrays):
    return [tf.constant(x) for x in arrays]


def mean(xs):
    return np.mean([np.mean(x) for x in xs])


def others(views, x):
    return views[:x] + views[x + 1 :]


EXAMPLE_IDS = np.array([4, 0, 2])
QUERIES = [g.unit_rows(s, 3, 5) for s in (1, 2)]
POSITIVES = [g.unit_rows(s, 3, 5) for s in (3, 4)]
BATCH = g.unit_rows(5, 6, 5)
OLD = g.unit_rows(6, 7, 5)
MOMENTUM_LOSSES = {
    losses.cacr_rbf: cacr.rbf,
    losses.cacr_euclidean: cacr.euclidean,
}


def test_losses_in_the_batch_equal_golden_values():
    views, example_ids = tensors(g.VIEWS), tf.range(4)
    attraction = [
        losses.cacr_attraction(views[x], others(views, x), sharpness=1.0)
        for x in range(3)
    ]
    repulsion = [
        losses.cacr_repulsion(x, y, example_ids, sharpness=0.9)
        for x, y in itertools.combinations(views, 2)
    ]
    assert {x.shape[0] for x in attraction + repulsion} == {4}
    assert mean(attraction) == pytest.approx(0.04921675174411272, abs=1e-12)
    assert mean(repulsion) == pytest.approx(-0.7998611967203543, abs=1e-12)


def test_losses_with_a_queue_equal_golden_values():
    queries, keys = tensors(g.VIEWS), tensors(g.KEYS_OF_VIEWS)
    attraction = [
        losses.cacr_attraction(
            queries[x], others(keys, x), sharpness=1.0, constant_weights=True
        )
        for x in range(3)
    ]
    repulsion = [
        losses.cacr_repulsion(
            q, q, tf.range(4), sharpness=2.0, queue=tf.constant(g.QUEUE)
        )
        for q in queries
    ]
    assert mean(attraction) == pytest.approx(0.05180975589931453, abs=1e-12)
    assert mean(repulsion) == pytest.approx(-0.3009848239587931, abs=1e-12)


def test_published_queue_form_differs_by_a_cached_product():
    """It computes `q @ queue` for the first view and reuses it for all."""
    cache = {}

    def distances_to_queue(query):
        if not cache:
            cache["all views"] = 2 - 2 * query @ g.QUEUE.T
        return cache["all views"]

    published = []
    for query in g.VIEWS:
        for i in range(4):
            near = [cacr.distance(query[i], x) for x in np.delete(query, i, 0)]
            costs = [*distances_to_queue(query)[i], *near]
            weights = cacr.softmax([-2.0 * d for d in costs])
            published.append(-cacr.weighted(weights, costs))
    assert mean(published) == pytest.approx(-0.30040579137242046, abs=1e-12)


@pytest.mark.parametrize(
    "temperature, value", [(1.0, 1.983579478578603), (0.2, 0.1673062025505335)]
)
def test_rbf_loss_equals_golden_values(temperature, value):
    loss = losses.cacr_rbf(
        tensors([g.WEAK, g.STRONG]),
        tf.constant(g.KEYS),
        tf.range(4),
        temperature=temperature,
    )
    assert loss.shape == [4]
    assert mean(loss) == pytest.approx(value, abs=1e-12)


def test_attraction_equals_the_formula_term_by_term():
    query = QUERIES[0]
    for sharpness, constant in itertools.product((0, 1.0, 3.0), (False, True)):
        loss = losses.cacr_attraction(
            tf.constant(query),
            tensors(POSITIVES),
            sharpness=sharpness,
            constant_weights=constant,
        )
        expected = cacr.attraction(query, POSITIVES, sharpness)
        np.testing.assert_allclose(loss, expected, atol=1e-12)


def test_repulsion_equals_the_formula_term_by_term():
    query = QUERIES[0]
    for sharpness, queue in itertools.product((0, 0.9, 3.0), ([], OLD)):
        loss = losses.cacr_repulsion(
            *tensors([query, BATCH, EXAMPLE_IDS]),
            sharpness=sharpness,
            queue=tf.constant(queue) if len(queue) else None,
        )
        expected = cacr.repulsion(query, BATCH, EXAMPLE_IDS, sharpness, queue)
        np.testing.assert_allclose(loss, expected, atol=1e-12)


@pytest.mark.parametrize("function, loop", MOMENTUM_LOSSES.items())
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_momentum_forms_equal_the_formula_term_by_term(
    function, loop, temperature
):
    loss = function(
        tensors(QUERIES),
        *tensors([BATCH, EXAMPLE_IDS]),
        temperature=temperature,
    )
    expected = loop(QUERIES, BATCH, EXAMPLE_IDS, temperature)
    np.testing.assert_allclose(loss, expected, atol=1e-12)


def test_rbf_of_two_views_is_half_of_moco_v3():
    queries, keys = tensors(QUERIES), tensors(POSITIVES)
    example_ids, t = tf.range(3), 0.2
    total = mean(
        losses.cacr_rbf([q], k, example_ids, temperature=t)
        for q, k in zip(queries, reversed(keys))
    )
    moco_v3 = sum(
        2
        * t
        * losses.info_nce(losses.cosines(q, k), example_ids, temperature=t)
        for q, k in zip(queries, reversed(keys))
    )
    assert total == pytest.approx(mean([moco_v3]) / 2, abs=1e-12)


def assert_gradients(function, oracle, arrays):
    """Compares gradients into `arrays` with finite differences of `oracle`.

    Both take unit rows. Slopes are for the rows before their normalisation, for
    which `2 - 2 cos` and the squared distance are the same.
    """
    row_weights = np.array([1.0, -0.5, 2.0])  # would reveal rows that mix
    raw = [tf.Variable(1.5 * x) for x in arrays]
    with tf.GradientTape() as tape:
        loss = function(*[tf.math.l2_normalize(x, axis=-1) for x in raw])
        loss = tf.reduce_sum(row_weights * loss)
    for which, gradient in enumerate(tape.gradient(loss, raw)):
        slopes = np.zeros(arrays[which].shape)
        for index in np.ndindex(*slopes.shape):
            for step in (1e-5, -1e-5):
                moved = [x.numpy() for x in raw]
                moved[which][index] += step
                value = row_weights @ oracle(*map(unit, moved))
                slopes[index] += value / (2 * step)
        assert np.abs(slopes).max() > 1e-3
        np.testing.assert_allclose(gradient, slopes, atol=1e-8)


@pytest.mark.parametrize("constant", [False, True])
def test_attraction_gradient_equals_finite_differences(constant):
    frozen = (QUERIES[0], POSITIVES) if constant else None
    assert_gradients(
        lambda q, *positives: losses.cacr_attraction(
            q, positives, sharpness=2.0, constant_weights=constant
        ),
        lambda q, *positives: cacr.attraction(q, positives, 2.0, frozen),
        [QUERIES[0], *POSITIVES],
    )


def test_repulsion_gradient_in_the_batch_equals_finite_differences():
    assert_gradients(
        lambda q, batch: losses.cacr_repulsion(
            q, batch, tf.constant(EXAMPLE_IDS), sharpness=2.0
        ),
        lambda q, batch: cacr.repulsion(q, batch, EXAMPLE_IDS, 2.0),
        [QUERIES[0], BATCH],
    )


def test_repulsion_gradient_with_a_queue_equals_finite_differences():
    assert_gradients(
        lambda q, batch: losses.cacr_repulsion(
            q,
            batch,
            tf.constant(EXAMPLE_IDS),
            sharpness=2.0,
            queue=tf.constant(OLD),
        ),
        lambda q, batch: cacr.repulsion(
            q, batch, EXAMPLE_IDS, 2.0, OLD, QUERIES[0]
        ),
        [QUERIES[0], BATCH],
    )


def test_repulsion_gradient_is_equal_where_queries_are_the_batch():
    example_ids = tf.range(3)
    query = QUERIES[0]
    assert_gradients(
        lambda q: losses.cacr_repulsion(
            q, q, example_ids, sharpness=2.0, queue=tf.constant(OLD)
        ),
        lambda q: cacr.repulsion(q, q, range(3), 2.0, OLD, query),
        [query],
    )


@pytest.mark.parametrize("function, loop", MOMENTUM_LOSSES.items())
def test_momentum_forms_gradient_equals_finite_differences(function, loop):
    keys, example_ids = tensors([BATCH, EXAMPLE_IDS])
    assert_gradients(
        lambda *queries: function(queries, keys, example_ids, temperature=0.5),
        lambda *queries: loop(queries, BATCH, EXAMPLE_IDS, 0.5, QUERIES),
        QUERIES,
    )


@pytest.mark.parametrize("function", MOMENTUM_LOSSES)
def test_momentum_forms_have_constant_keys(function):
    keys = tf.Variable(BATCH)
    with tf.GradientTape() as tape:
        loss = function(
            tensors(QUERIES), keys, tf.constant(EXAMPLE_IDS), temperature=0.5
        )
    assert tape.gradient(loss, keys) is None


@pytest.mark.parametrize("queue", [None, OLD])
def test_repulsion_ignores_the_own_row(queue):
    changed = BATCH.copy()
    changed[EXAMPLE_IDS[1]] = g.unit_rows(9, 5)

    def loss(batch):
        return losses.cacr_repulsion(
            *tensors([QUERIES[0], batch, EXAMPLE_IDS]),
            sharpness=2.0,
            queue=None if queue is None else tf.constant(queue),
        ).numpy()

    difference = loss(changed) - loss(BATCH)
    assert difference[1] == 0
    assert difference[0] != 0 and difference[2] != 0


def whole_batch(example_ids):
    """Returns every CACR loss of some rows of a global batch of 6."""
    views = [g.unit_rows(s, 6, 5) for s in (7, 8)]
    queries = tensors([v[example_ids] for v in views])
    batch, old, example_ids = tensors([BATCH, OLD, example_ids])
    return [
        losses.cacr_attraction(queries[0], queries, sharpness=1.0),
        losses.cacr_repulsion(queries[0], batch, example_ids, sharpness=2.0),
        losses.cacr_repulsion(
            queries[0], batch, example_ids, sharpness=2.0, queue=old
        ),
        losses.cacr_rbf(queries, batch, example_ids, temperature=0.2),
        losses.cacr_euclidean(queries, batch, example_ids, temperature=0.2),
    ]


def test_losses_of_parts_of_the_batch_equal_those_of_the_whole():
    whole = whole_batch(np.arange(6))
    parts = zip(whole_batch(np.arange(3, 6)), whole_batch(np.arange(3)))
    for loss, (last, first) in zip(whole, parts):
        assert loss.shape == [6]
        np.testing.assert_allclose(
            tf.concat([first, last], 0), loss, rtol=1e-13
        )


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32])
def test_losses_are_finite_for_equal_rows_and_extreme_weights(dtype):
    example_ids = tf.range(4)
    for x in ([[1.0, 0.0]] * 4, [[1.0, 0.0], [-1.0, 0.0]] * 2):
        x = tf.Variable(x, dtype=dtype)
        with tf.GradientTape() as tape:
            loss = losses.cacr_attraction(x, [x, -x], sharpness=100.0)
            loss += losses.cacr_repulsion(
                x, x, example_ids, sharpness=100.0, queue=x
            )
            loss += losses.cacr_rbf([x, -x], x, example_ids, temperature=0.01)
            loss += losses.cacr_euclidean(
                [x, -x], x, example_ids, temperature=0.01
            )
        assert loss.dtype == tf.float32
        assert np.isfinite(loss).all()
        slope = tape.gradient(loss, x)
        assert np.isfinite(tf.cast(slope, tf.float32)).all()
