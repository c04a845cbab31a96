import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.methods import statistics
from clsa_tf.training import collapse


def projections(kind, rng):
    x = {
        "even": rng.normal(size=[256, 32]),
        "cone": rng.normal(size=[256, 32]) + 3.0,
        "line": rng.normal(size=[256, 1]) * np.ones([1, 32]) + np.arange(32),
        "five": rng.normal(size=[1024, 32]) * (np.arange(32) < 5) + 0.5,
        "one": rng.normal(size=[256, 32]) * 1e-5 + 1.0,
    }[kind]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def measured(x):
    found = statistics.measures(tf.constant(x, tf.float32))
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("kind", ["even", "cone", "line", "five", "one"])
def test_measures_equal_those_of_the_covariance(kind):
    x = projections(kind, np.random.default_rng(0))
    found = measured(x)
    covariance = np.cov(x.T)
    spread = np.trace(covariance)
    assert found["spread"] == pytest.approx(spread, abs=2e-6)
    assert found["spread"] == pytest.approx(spread, rel=1e-3)
    distances = np.sum((x[:, None] - x[None]) ** 2, axis=-1)
    others = ~np.eye(len(x), dtype=bool)
    uniformity = np.log(np.mean(np.exp(-2 * distances[others])))
    assert found["uniformity"] == pytest.approx(uniformity, abs=1e-5)
    # NumPy's eigenvalues are of few samples, ours estimate the distribution's.
    directions = {"even": 32, "cone": 31, "line": 1, "five": 5, "one": 31}
    assert found["rank"] == pytest.approx(directions[kind], rel=0.08)


def test_few_samples_give_the_rank_of_many():
    """32 samples give rank 32, though their own covariance has rank 16."""
    rng = np.random.default_rng(0)
    x = [projections("even", rng)[:32] for _ in range(50)]
    ranks = [measured(each)["rank"] for each in x]
    assert np.mean(ranks) == pytest.approx(32, rel=0.1)


def test_identical_projections_have_no_spread_and_rank_one():
    found = measured(np.ones([16, 4]) / 2)
    assert found == {"spread": 0.0, "rank": 1.0, "uniformity": 0.0}


def test_measures_of_two_projections_are_finite():
    found = measured(np.eye(2))
    assert found["spread"] == pytest.approx(1.0)
    assert np.all(np.isfinite(list(found.values())))


def messages(history, *, patience=100, rank=20.0):
    watch = collapse.Watch(32, patience=patience)
    values = [{"spread": s, "rank": rank, "uniformity": -1.0} for s in history]
    return [watch.words(10 * i, v) for i, v in enumerate(values)]


def test_messages_follow_a_collapse():
    words = messages([0.02, 0.03, 0.5, 0.9, 0.8, 0.4, 0.42, 0.01, 0.01])
    assert "as those of untrained networks do" in words[0]
    assert "have spread out" in words[2]
    assert "below half of its best of 0.900" in words[5]
    assert "have collapsed" in words[7] and "spread 0.010 of 1" in words[7]
    assert [bool(w) for w in words] == [1, 0, 1, 0, 0, 1, 0, 1, 0]


def test_a_small_spread_is_not_called_a_success():
    words = messages([0.02, 0.2, 0.9])
    assert "some untrained networks do" in words[1]
    for spread, expected in ((0.2, "some untrained"), (0.9, "have spread out")):
        last = collapse.verdict(entries([0.1, spread]), 32)
        assert last.state == "open" and not last.unusable
        assert expected in last.words


def test_a_spread_that_stays_small_becomes_a_warning():
    words = messages([0.02] * 12)
    assert "untrained" in words[0] and "does not learn" in words[10]
    assert not any(words[1:10]) and not words[11]


def test_a_good_run_gets_no_messages():
    assert messages([0.6, 0.8, 0.9, 0.7, 0.9]) == [""] * 5


def test_a_low_rank_is_reported_after_the_beginning():
    words = messages([0.6] * 12, rank=1.3)
    assert not any(words[:10])
    assert "near one line" in words[10]


def entries(history, *, steps_per_epoch=10, rank=20.0):
    return [
        {"step": 10 * i, "epoch": 10 * i / steps_per_epoch, "spread": s}
        | {"rank": rank, "uniformity": -1.0}
        for i, s in enumerate(history, 1)
    ]


@pytest.mark.parametrize(
    "history, state, unusable",
    [
        ([0.6, 0.8], "open", False),
        ([0.02] * 3, "narrow", False),
        ([0.02] * 60, "late", True),
        ([0.02, 0.5, 0.9, 0.3], "falling", False),
        ([0.02, 0.5, 0.9, 0.01], "collapsed", True),
    ],
)
def test_the_verdict_follows_from_the_log(history, state, unusable):
    logged = entries(history)
    # Other lines, for example of an evaluation, are ignored.
    found = collapse.verdict([*logged, {"step": 999, "knn": 0.5}], 32)
    assert (found.state, found.unusable) == (state, unusable)
    assert found.step == logged[-1]["step"]
    assert f"spread {history[-1]:.3f} of 1" in found.words


def test_long_epochs_delay_the_warning():
    logged = entries([0.02] * 60, steps_per_epoch=1000)
    assert collapse.verdict(logged, 32).state == "narrow"


def test_without_measures_there_is_no_verdict():
    assert (
        collapse.verdict([{"step": 4, "epoch": 1.0, "loss": 1.0}], 32) is None
    )
