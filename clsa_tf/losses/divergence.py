"""Divergence between distributions over the same candidates."""

import tensorflow as tf

from clsa_tf.losses.products import at_least_float32, row_by_row


def ddm(weak, strong, *, temperature):
    """Distributional divergence (DDM): weak views supervise strong views.

    With `t_i = softmax(weak_i / T)` and `r_j = softmax(strong_j / T)` this is
    the cross-entropy summed over all pairs,

        sum_i sum_j ( - sum_c t_i[c] log r_j[c] ),

    computed as one product, `-(sum_i t_i) . (sum_j log r_j)`. No gradient flows
    into `weak`, the teachers. The minimum is not 0 but the sum of the teachers'
    entropies, see `teacher_entropy`.

    Args:
        weak: sequence of float `[N, C]`, cosines of each weak view.
        strong: sequence of float `[N, C]`, cosines of each strong view with the
            same candidates.
        temperature: T > 0, divides the cosines of both.

    Returns:
        float `[N]`, nats.

    Source: CLSA (Contrastive Learning with Stronger Augmentations), L_DDM;
    maple-research-lab/CLSA@37df76c `training/train.py`. That code computes
    `log(softmax)`; `log_softmax` gives the same value without underflow.
    """
    teachers = tf.add_n([_softmax(x, temperature) for x in weak])
    log_students = tf.add_n(
        [tf.nn.log_softmax(at_least_float32(x) / temperature) for x in strong]
    )
    return -row_by_row(tf.stop_gradient(teachers), log_students)


def teacher_entropy(weak, *, temperature):
    """Entropy of each row's teacher distribution, summed over weak views.

    `ddm - number of strong views * teacher_entropy` is the Kullback-Leibler
    divergence. Its minimum is 0, so it shows the progress of training.

    Args:
        weak: sequence of float `[N, C]`, cosines of each weak view.
        temperature: T > 0.

    Returns:
        float `[N]`, nats, in [0, len(weak) ln C].
    """
    logits = [at_least_float32(x) / temperature for x in weak]
    return tf.add_n(
        [-row_by_row(tf.nn.softmax(x), tf.nn.log_softmax(x)) for x in logits]
    )


def _softmax(similarities, temperature):
    return tf.nn.softmax(at_least_float32(similarities) / temperature)
