"""Features of a whole dataset, as NumPy arrays."""

import numpy as np
import tensorflow as tf

from clsa_tf.networks.encoder import copy_variables


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


class Snapshot:
    """A copy of an encoder in training, for evaluation outside its strategy.

    Under a strategy, all workers must read running statistics together. With
    the copy, one worker can evaluate alone.

    Args:
        method: the `Method` that trains the encoder.
        strategy: the strategy of the run.

    Attributes:
        features: compiled function, uint8 `[B, S, S, 3]` -> float32 `[B, F]`.
    """

    def __init__(self, method, strategy):
        """Creates the copy on the first device of this process."""
        self._encoder = method.encoder
        with tf.device(strategy.extended.worker_devices[0]):
            self._copy = method.make_encoder("evaluated")
        self.features = compiled(lambda x: self._copy(x, training=False))

    def take(self):
        """Copies the current variables; all workers must call it."""
        copy_variables(self._encoder, self._copy)


def pixels(images):
    """Raw pixels as features: float32 `[B, S S 3]` in [-0.5, 0.5].

    A baseline that an encoder has to exceed.
    """
    flat = tf.reshape(images, [tf.shape(images)[0], -1])
    return tf.cast(flat, tf.float32) / 255.0 - 0.5
