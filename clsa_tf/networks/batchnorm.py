"""Batch normalisation per replica, over all replicas or per part of a batch."""

import tensorflow as tf
from tensorflow import keras

KINDS = ("local", "sync", "split")

# torch's momentum 0.1, which Keras counts as 1 - 0.1, and its epsilon.
_MOMENTUM = 0.9
_EPSILON = 1e-5


@keras.saving.register_keras_serializable("clsa_tf")
class SplitBatchNormalization(keras.layers.BatchNormalization):
    """Normalises consecutive parts of the batch separately in training.

    One device then computes the same as `splits` replicas with their own
    statistics. MoCo needs this: if query and key share batch statistics, the
    network can recognise the batch instead of the image. The running statistics
    are the mean over the parts, as under `tf.distribute`.

    Args:
        splits: number of equal, consecutive parts of the batch.
        **kwargs: arguments of `keras.layers.BatchNormalization`.

    Source: SplitBatchNorm of MoCo's CIFAR-10 demonstration, whose parts are
    every `splits`-th row instead of consecutive rows.
    """

    def __init__(self, splits, **kwargs):
        """See the class."""
        super().__init__(**kwargs)
        self.splits = splits

    def call(self, inputs, training=None):
        """Normalises float `[N, H, W, C]`; `splits` divides `N`."""
        if not training:
            return super().call(inputs, training=False)
        channels = self.moving_mean.shape
        scale = self.gamma if self.scale else tf.ones(channels)
        offset = self.beta if self.center else tf.zeros(channels)
        parts = [
            tf.compat.v1.nn.fused_batch_norm(
                part, scale, offset, epsilon=self.epsilon
            )
            for part in tf.split(inputs, self.splits, axis=0)
        ]
        outputs, means, variances = zip(*parts)
        for running, values in (
            (self.moving_mean, means),
            (self.moving_variance, variances),
        ):
            new = tf.add_n(list(values)) / self.splits
            running.assign_sub((1 - self.momentum) * (running - new))
        return tf.concat(outputs, axis=0)

    def get_config(self):
        """Returns the constructor's arguments, for `from_config`."""
        return super().get_config() | {"splits": self.splits}


def batch_norm(
    kind, *, splits=1, dtype="float32", center=True, scale=True, name
):
    """Returns a batch normalisation layer with torch's constants.

    Running variances are unbiased, as in torch, except with `"sync"`.

    Args:
        kind: `"local"` (own statistics on each replica, as in MoCo and CLSA),
            `"sync"` (statistics of the global batch) or `"split"` (see
            `SplitBatchNormalization`).
        splits: number of parts of the batch, for `"split"`.
        dtype: Keras policy; statistics are always float32.
        center: whether an offset is learned.
        scale: whether a factor is learned.
        name: name of the layer.
    """
    constants = dict(
        momentum=_MOMENTUM,
        epsilon=_EPSILON,
        center=center,
        scale=scale,
        dtype=dtype,
        name=name,
    )
    if kind == "split":
        return SplitBatchNormalization(splits, **constants)
    return keras.layers.BatchNormalization(
        synchronized=kind == "sync", **constants
    )


def splits_on_replica(config):
    """Number of parts of a replica's micro-batch with separate statistics.

    Args:
        config: `clsa_tf.config.Config`. Its `batch_norm_splits` counts the
            parts of the global batch.
    """
    if config.batch_norm != "split":
        return 1
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    parts = replicas * config.accumulation_steps
    return max(1, config.batch_norm_splits // parts)
