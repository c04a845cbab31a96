"""Predicting an embedding, without anything to tell it from."""

import tensorflow as tf

from clsa_tf.losses.products import at_least_float32, row_by_row


def regression(predictions, targets):
    """Squared distance of each prediction to its target, `2 - 2 cos`.

    BYOL adds both directions: each view predicts the other's target. The
    targets are constants: no gradient flows into them, without which the
    embeddings would collapse.

    Args:
        predictions: float `[N, D]`, unit rows.
        targets: float `[N, D]`, unit rows.

    Returns:
        float `[N]`, squared length, in [0, 4]; 2 for unrelated directions.

    Source: BYOL (arXiv 2006.07733) eq. 2; deepmind/deepmind-research `byol`.
    """
    targets = tf.stop_gradient(at_least_float32(targets))
    return 2 - 2 * row_by_row(predictions, targets)
