"""kNN classification: evaluates features without training a classifier."""

import numpy as np
import tensorflow as tf

from clsa_tf.losses import products

TITLE = "kNN"


def neighbours(bank, queries, *, k, own=None):
    """Finds the `k` most similar rows of the bank, by cosine.

    Args:
        bank: float32 `[M, F]`.
        queries: float32 `[Q, F]`.
        k: number of neighbours, at most `M`, or `M - 1` with `own`.
        own: int `[Q]`, row of each query in the bank, which is excluded from
            its neighbours; None if the queries are not in the bank.

    Returns:
        cosines float32 `[Q, k]`, largest first, and rows int32 `[Q, k]`.
    """
    bank = tf.math.l2_normalize(bank, axis=1)
    found = []
    for start in range(0, len(queries), 1024):  # bounds the memory
        chunk = tf.math.l2_normalize(queries[start : start + 1024], axis=1)
        cosines = products.all_pairs(chunk, bank)
        if own is not None:
            mine = np.asarray(own[start : start + 1024])
            cells = np.stack([np.arange(len(mine)), mine], axis=1)
            never = tf.fill([len(mine)], -np.inf)
            cosines = tf.tensor_scatter_nd_update(cosines, cells, never)
        found.append(tf.math.top_k(cosines, k))
    cosines, rows = zip(*found)
    return np.concatenate(cosines), np.concatenate(rows)


def knn_accuracy(
    bank, bank_labels, queries, query_labels, *, k, temperature, own=None
):
    """Accuracy of kNN classification, the share of correct queries.

    Each of the `k` nearest rows votes for its class with `exp(cosine / T)`.

    Args:
        bank: float32 `[M, F]`, features of labelled images.
        bank_labels: int `[M]`, classes from 0.
        queries: float32 `[Q, F]`.
        query_labels: int `[Q]`.
        k: number of neighbours; limited to the size of the bank.
        temperature: T > 0.
        own: see `neighbours`.

    Returns:
        float in [0, 1].

    Source: weighted kNN of InstDisc (zhirongw/lemniscate.pytorch).
    """
    k = min(k, len(bank) - (own is not None))
    cosines, rows = neighbours(bank, queries, k=k, own=own)
    votes = np.exp((cosines - 1.0) / temperature)  # minus 1: no overflow
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    tally = np.zeros([len(queries), classes])
    labels = bank_labels[rows]  # [Q, k]
    np.add.at(tally, (np.arange(len(queries))[:, np.newaxis], labels), votes)
    return float(np.mean(tally.argmax(axis=1) == query_labels))


def accuracy(bank, queries, *, own, config):
    """Returns the kNN accuracy in [0, 1]; see `protocols`."""
    return knn_accuracy(
        *bank,
        *queries,
        k=config.knn_k,
        temperature=config.knn_temperature,
        own=own,
    )
