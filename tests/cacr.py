"""The CACR losses in NumPy, row by row, as published.

Weights without a gradient are computed from `frozen`, which finite differences
leave unchanged.
"""

import numpy as np


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b))


def softmax(logits):
    exponentials = [np.exp(x) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


def weighted(weights, costs):
    return sum(w * c for w, c in zip(weights, costs))


def attraction(queries, positives, sharpness, frozen=None):
    def distances(queries, positives, i):
        return [distance(queries[i], p[i]) for p in positives]

    result = []
    for i in range(len(queries)):
        costs = distances(queries, positives, i)
        source = distances(*frozen, i) if frozen else costs
        weights = softmax([sharpness * d for d in source])
        result.append(weighted(weights, costs))
    return np.array(result)


def repulsion(queries, others, example_ids, sharpness, queue=(), frozen=None):
    result = []
    for i, own in enumerate(example_ids):
        near = [distance(queries[i], o) for o in np.delete(others, own, 0)]
        old = [distance(queries[i], k) for k in queue]
        source = (
            [distance(frozen[i], k) for k in queue]
            if frozen is not None
            else old
        )
        weights = softmax([-sharpness * d for d in source + near])
        result.append(-weighted(weights, old + near))
    return np.array(result)


def rbf(queries, keys, example_ids, temperature, frozen=None):
    result = np.zeros(len(example_ids))
    for i, own in enumerate(example_ids):
        source = queries if frozen is None else frozen
        p = softmax([distance(q[i], keys[own]) / temperature for q in source])
        for v, q in enumerate(queries):
            chance = softmax([q[i] @ k / temperature for k in keys])[own]
            result[i] -= 2 * temperature * p[v] * np.log(chance)
    return result


def euclidean(queries, keys, example_ids, temperature, frozen=None):
    result = np.zeros(len(example_ids))
    for i, own in enumerate(example_ids):
        source = queries if frozen is None else frozen
        p = softmax([distance(q[i], keys[own]) / temperature for q in source])
        for v, q in enumerate(queries):
            others = np.delete(keys, own, 0)
            u = softmax([-(1 - source[v][i] @ k) / temperature for k in others])
            repulsion = weighted(u, [-(1 - q[i] @ k) for k in others])
            result[i] += p[v] * (1 - q[i] @ keys[own] + repulsion)
    return result
