import numpy as np
import pytest

from clsa_tf.evaluation import knn


def naive(bank, labels, queries, truth, k, temperature):
    right = 0
    for query, label in zip(queries, truth):
        cosines = [
            b @ query / np.linalg.norm(b) / np.linalg.norm(query) for b in bank
        ]
        votes = {}
        for row in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            weight = np.exp(cosines[row] / temperature)
            votes[labels[row]] = votes.get(labels[row], 0) + weight
        right += max(votes, key=votes.get) == label
    return right / len(queries)


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (7, 0.1), (30, 1.0)])
def test_accuracy_equals_the_formula(k, temperature):
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 4, 40), rng.integers(0, 4, 1500)
    centres = rng.normal(size=[4, 6])
    bank = np.float32(centres[labels] + 2 * rng.normal(size=[40, 6]))
    queries = np.float32(centres[truth] + 2 * rng.normal(size=[1500, 6]))
    got = knn.knn_accuracy(
        bank, labels, queries, truth, k=k, temperature=temperature
    )
    expected = naive(bank, labels, queries, truth, k, temperature)
    assert got == pytest.approx(expected, abs=1e-3)
    assert 0.3 < got < 0.95  # neither chance level nor perfect


def test_more_neighbours_than_images_means_all():
    bank = np.float32([[1, 0], [0, 1], [0, 1]])
    labels = np.array([0, 1, 1])
    accuracy = knn.knn_accuracy(
        bank, labels, bank, labels, k=200, temperature=0.1
    )
    assert accuracy == 1.0


def test_small_temperature_does_not_overflow():
    bank = np.float32([[1, 0], [-1, 0]])
    labels = np.array([1, 0])
    accuracy = knn.knn_accuracy(
        bank, labels, bank, labels, k=2, temperature=1e-3
    )
    assert accuracy == 1.0


@pytest.mark.parametrize("k", [1, 7, 2000])
def test_an_image_is_not_its_own_neighbour(k):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1100)  # more than one chunk
    bank = np.float32(rng.normal(size=[4, 6])[labels])
    bank += np.float32(2 * rng.normal(size=[1100, 6]))
    bank[-1] = bank[0]  # a copy is another image
    own = np.arange(1100)
    got = knn.knn_accuracy(
        bank, labels, bank, labels, k=k, temperature=0.1, own=own
    )
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    expected = unit @ unit.T
    expected[own, own] = -np.inf
    limit = np.sort(expected, axis=1)[:, -min(k, 1099)][:, np.newaxis]
    votes = np.where(expected >= limit, np.exp(expected / 0.1), 0)
    classes = (votes @ np.eye(4)[labels]).argmax(axis=1)
    assert got == pytest.approx(np.mean(classes == labels), abs=2e-3)
    assert 0.3 < got < 0.95
    cosines, rows = knn.neighbours(bank, bank[-2:], k=3, own=own[-2:])
    assert rows[1, 0] == 0 and cosines[1, 0] == pytest.approx(1)
    assert 1098 not in rows[0] and 1099 not in rows[1]
    assert (np.diff(cosines, axis=1) <= 0).all()
