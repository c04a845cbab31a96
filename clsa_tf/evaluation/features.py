"""Features of a whole dataset, as arrays."""

import numpy as np
import tensorflow as tf


def extract(function, batches):
    """Applies `function` to every batch of images.

    Args:
        function: uint8 `[B, S, S, 3]` -> float `[B, F]`; see `compiled`.
        batches: dataset of (images uint8 `[B, S, S, 3]`, labels int64 `[B]`).

    Returns:
        float32 `[M, F]` and int64 `[M]`, NumPy arrays.
    """
    features, labels = [], []
    for images, batch_labels in batches:
        features.append(function(images).numpy().astype(np.float32))
        labels.append(batch_labels.numpy())
    return np.concatenate(features), np.concatenate(labels)


def compiled(function):
    """Compiles a function of uint8 images `[B, S, S, 3]` once for all `B`."""
    images = tf.TensorSpec([None, None, None, 3], tf.uint8)
    return tf.function(function, input_signature=[images])


def pixels(images):
    """Raw pixels as features: float32 `[B, S S 3]` in [-0.5, 0.5].

    The baseline that an encoder has to beat.
    """
    flat = tf.reshape(images, [tf.shape(images)[0], -1])
    return tf.cast(flat, tf.float32) / 255.0 - 0.5
