"""Contrastive losses (InfoNCE, NT-Xent) and the similarities that they use."""

import math

import tensorflow as tf

from clsa_tf.losses.products import all_pairs, at_least_float32

# Larger than the rounding errors of float32 cosines.
_ROUNDING = 1e-6


def cosines(rows, columns):
    """Cosine similarity of every row with every column.

    Args:
        rows: float `[N, D]`, unit rows.
        columns: float `[C, D]`, unit rows.

    Returns:
        float32 `[N, C]` (float64 if the inputs are), in [-1, 1].
    """
    return all_pairs(rows, columns)


def info_nce(similarities, positive, *, temperature):
    """InfoNCE: cross-entropy of classifying each row's own key.

    The chance level is `ln C`.

    Args:
        similarities: float `[N, C]`, cosines.
        positive: int32 `[N]`, column of the row's own key, in [0, C).
        temperature: T > 0, divides the cosines.

    Returns:
        float `[N]`, nats, >= 0.

    Source: MoCo (arXiv 1911.05722) eq. 1; CLSA maple-research-lab/CLSA@37df76c.
    """
    return tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=positive, logits=at_least_float32(similarities) / temperature
    )


def top1(similarities, positive):
    """Whether each row's own key is the most similar of all candidates.

    A tie is a miss, so collapsed projections score 0. Cosines that differ by
    rounding only are a tie: kernels that compute different columns may round
    differently.

    Args:
        similarities: float `[N, C]`.
        positive: int32 `[N]`, column of the row's own key, in [0, C).

    Returns:
        float32 `[N]`, 0 or 1.
    """
    own = tf.gather(similarities, positive, batch_dims=1)[:, tf.newaxis]
    # Includes the own key.
    as_near = tf.cast(similarities >= own - _ROUNDING, tf.int32)
    return tf.cast(tf.reduce_sum(as_near, axis=1) == 1, tf.float32)


def nt_xent(queries, positives, others, example_ids, *, temperature):
    """NT-Xent: InfoNCE among two views of all images of the global batch.

    With `p_j`, `o_j` the rows of `positives` and `others`, `i` the row's own,

        - log e(q.p_i) / (sum_j e(q.p_j) + sum_{j != i} e(q.o_j)),
        e(x) = exp(x / T).

    SimCLR's loss of an image with views `h1`, `h2`, gathered `H1`, `H2`, is
    `nt_xent(h1, H2, H1, ...) + nt_xent(h2, H1, H2, ...)`, as in the published
    code. That is twice the paper's loss, the mean of the two. The gradient
    flows into all three inputs, so the caller has to gather with gradient.

    Args:
        queries: float `[N, D]`, unit rows.
        positives: float `[G, D]`, unit rows: another view of each image of the
            global batch.
        others: float `[G, D]`, unit rows: the queries' own view, or a third
            view. The own row is masked.
        example_ids: int32 `[N]`, in [0, G): position of each query in the
            global batch.
        temperature: T > 0, divides the cosines.

    Returns:
        float `[N]`, nats, >= 0; the chance level is `ln(2 G - 1)`.

    Source: SimCLR (arXiv 2002.05709) eq. 1; google-research/simclr
    `tf2/objective.py`, which subtracts 1e9 from the own logit instead.
    """
    similarities = [
        cosines(queries, positives),
        mask_own(cosines(queries, others), example_ids),
    ]
    return info_nce(
        tf.concat(similarities, axis=1), example_ids, temperature=temperature
    )


def mask_own(logits, own):
    """Sets each row's own column of `logits` to minus infinity.

    A softmax gives that column probability 0 and no gradient.

    Args:
        logits: float `[N, G]`.
        own: int32 `[N]`, in [0, G), the own columns.
    """
    columns = tf.range(tf.shape(logits)[1], dtype=own.dtype)
    masked = columns[tf.newaxis] == own[:, tf.newaxis]
    return tf.where(masked, tf.cast(-math.inf, logits.dtype), logits)
