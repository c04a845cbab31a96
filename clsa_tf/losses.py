"""The objectives, as pure functions: similarities in, one value per row out.

`N` rows per replica, `C` candidates (keys of the batch and of the queue).
Similarities are cosines in [-1, 1]; every function divides by its own
temperature. Nothing here averages over rows, divides by the number of replicas
or holds state: that is `Method.train_step`'s business. Everything is computed
in at least float32 (float16 would underflow: a typical probability
over 65,536 keys is 1e-5 to 1e-9).
"""

import tensorflow as tf


def _as_float32(x):
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def cosines(rows, columns):
    """Returns the similarity of every row with every column.

    Args:
        rows: float `[N, D]`, unit rows.
        columns: float `[C, D]`, unit rows.

    Returns:
        float32 `[N, C]` (float64 if the inputs are), in [-1, 1].
    """
    return tf.einsum("nd,cd->nc", _as_float32(rows), _as_float32(columns))


def info_nce(similarities, positive, *, temperature):
    """Cross-entropy of recognising each row's own key among the candidates.

    A network that tells nothing apart sits at `ln C`.

    Args:
        similarities: float `[N, C]`, cosines.
        positive: int32 `[N]`, column of the row's own key, in [0, C).
        temperature: T > 0, divides the cosines.

    Returns:
        float `[N]`, nats, >= 0.

    Source: MoCo (arXiv 1911.05722) eq. 1; CLSA maple-research-lab/CLSA@37df76c.
    """
    return tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=positive, logits=_as_float32(similarities) / temperature
    )


def ddm(weak, strong, *, temperature):
    """Distributional divergence: weak views' distributions teach the strong.

    With `t_i = softmax(weak_i / T)` and `r_j = softmax(strong_j / T)` this is
    the cross-entropy summed over all pairs,

        sum_i sum_j ( - sum_c t_i[c] log r_j[c] ),

    computed as one product, `-(sum_i t_i) . (sum_j log r_j)`. The teachers are
    constants: no gradient flows into `weak`. The floor is not 0 but the sum of
    the teachers' entropies, see `teacher_entropy`.

    Args:
        weak: sequence of float `[N, C]`, cosines of each weak view.
        strong: sequence of float `[N, C]`, cosines of each strong view with the
            same candidates.
        temperature: T > 0, divides the cosines of both.

    Returns:
        float `[N]`, nats.

    Source: CLSA (Contrastive Learning with Stronger Augmentations), L_DDM;
    maple-research-lab/CLSA@37df76c `training/train.py`, which takes
    `log(softmax)`; `log_softmax` here, the same value without its underflow.
    """
    teachers = tf.add_n([_softmax(x, temperature) for x in weak])
    log_students = tf.add_n(
        [tf.nn.log_softmax(_as_float32(x) / temperature) for x in strong]
    )
    return -tf.einsum("nc,nc->n", tf.stop_gradient(teachers), log_students)


def teacher_entropy(weak, *, temperature):
    """Entropy of each row's teacher distribution, summed over weak views.

    `ddm - number of strong views * teacher_entropy` is the Kullback-Leibler
    divergence, which does go to zero: the number to watch while training.

    Args:
        weak: sequence of float `[N, C]`, cosines of each weak view.
        temperature: T > 0.

    Returns:
        float `[N]`, nats, in [0, len(weak) ln C].
    """
    logits = [_as_float32(x) / temperature for x in weak]
    return tf.add_n(
        [
            -tf.einsum("nc,nc->n", tf.nn.softmax(x), tf.nn.log_softmax(x))
            for x in logits
        ]
    )


def _softmax(similarities, temperature):
    return tf.nn.softmax(_as_float32(similarities) / temperature)
