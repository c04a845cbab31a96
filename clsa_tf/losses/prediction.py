"""Regression of a target projection, without negatives."""

import tensorflow as tf

from clsa_tf.losses.products import at_least_float32, row_by_row


def regression(predictions, targets):
    """Squared distance of each prediction to its target, `2 - 2 cos`.

    BYOL adds both directions: each view predicts the target of the other. No
    gradient flows into the targets; with one, the projections would collapse.

    Args:
        predictions: float `[N, D]`, unit rows.
        targets: float `[N, D]`, unit rows.

    Returns:
        float `[N]`, squared length, in [0, 4]; 2 for unrelated directions.

    Source: BYOL (arXiv 2006.07733) eq. 2; deepmind/deepmind-research `byol`.
    """
    targets = tf.stop_gradient(at_least_float32(targets))
    return 2 - 2 * row_by_row(predictions, targets)
