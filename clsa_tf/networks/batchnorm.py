"""Batch normalisation with the statistics of a replica, of all, or of parts."""

import tensorflow as tf
from tensorflow import keras

KINDS = ("local", "sync", "split")

# torch's momentum 0.1 and epsilon, in Keras' terms.
_MOMENTUM = 0.9
_EPSILON = 1e-5


@keras.saving.register_keras_serializable("clsa_tf")
class SplitBatchNormalization(keras.layers.BatchNormalization):
    """Normalises consecutive parts of the batch separately while training.

    One device then computes what `splits` replicas with their own statistics
    would: MoCo needs that, because a network that sees query and key in the
    same statistics can recognise the batch instead of the image. The running
    statistics are the mean over the parts, as under `tf.distribute`.

    Args:
        splits: number of equal, consecutive parts of the batch.
        **kwargs: of `keras.layers.BatchNormalization`.

    Source: SplitBatchNorm of MoCo's CIFAR-10 demonstration, which takes every
    `splits`-th row instead of consecutive ones.
    """

    def __init__(self, splits, **kwargs):
        """See the class."""
        super().__init__(**kwargs)
        self.splits = splits

    def call(self, inputs, training=None):
        """Normalises float `[N, H, W, C]`; `N` divides by `splits`."""
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
        """Returns the arguments that make this layer again."""
        return super().get_config() | {"splits": self.splits}


def batch_norm(
    kind, *, splits=1, dtype="float32", center=True, scale=True, name
):
    """Returns a batch normalisation layer with torch's constants.

    Args:
        kind: `"local"` (each replica its own statistics; MoCo's and CLSA's
            choice), `"sync"` (statistics of the global batch) or `"split"`
            (see `SplitBatchNormalization`).
        splits: parts of the batch, for `"split"`.
        dtype: Keras policy; statistics are float32 anyway.
        center: whether an offset is learned.
        scale: whether a factor is learned.
        name: of the layer.

    Running variances are the unbiased ones, as torch's, except with `"sync"`.
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
    """Parts of a replica's micro-batch with batch statistics of their own.

    Args:
        config: `clsa_tf.config.Config`. Its `batch_norm_splits` are parts of
            the global batch.
    """
    if config.batch_norm != "split":
        return 1
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    parts = replicas * config.accumulation_steps
    return max(1, config.batch_norm_splits // parts)
