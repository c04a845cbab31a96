"""Base classes of methods with a momentum encoder, and checks of the queue."""

import math

import tensorflow as tf

from clsa_tf.distributed import collectives
from clsa_tf.errors import UserError
from clsa_tf.methods.base import Method
from clsa_tf.methods.key_queue import KeyQueue
from clsa_tf.networks import heads
from clsa_tf.networks.batchnorm import splits_on_replica
from clsa_tf.networks.encoder import copy_variables, unit
from clsa_tf.options.fields import AUTO

# Attribute names in checkpoints of earlier versions -> present names.
_FORMER_NAMES = {"key_encoder": "momentum_encoder"}


class MomentumMethod(Method):
    """A method whose targets come from a moving average of its encoder.

    Attributes:
        momentum_encoder: the moving average. Its batch normalisation uses
            batch statistics. Only `update` changes its weights.
    """

    def __init__(self, *args):
        """See `Method`."""
        super().__init__(*args)
        self.momentum_encoder = self.make_encoder("momentum_encoder")
        copy_variables(self.encoder, self.momentum_encoder)

    def _lookup_dependency(self, name, *args, **kwargs):
        # TensorFlow calls this with each name in a checkpoint.
        name = _FORMER_NAMES.get(name, name)
        return super()._lookup_dependency(name, *args, **kwargs)

    def update(self, batch, targets, outputs):
        """Moves the momentum encoder towards the encoder."""
        collectives.moving_average(
            self.momentum_encoder.trainable_variables,
            self.encoder.trainable_variables,
            self.momentum,
        )

    def momentum(self):
        """The momentum m of the present step, float or float32 scalar.

        With the cosine schedule it is `1 - (1 - m) (cos(pi k / K) + 1) / 2` at
        step k of K, where m is `--key_momentum`.

        Source: google-deepmind/deepmind-research, byol/utils/schedules.py.
        """
        start = self.options.key_momentum
        if self.options.key_momentum_schedule == "constant":
            return start
        done = tf.cast(self.steps_taken, tf.float32) / self.run.total_steps
        done = tf.minimum(done, 1.0)
        return 1.0 - (1.0 - start) * (tf.cos(math.pi * done) + 1.0) / 2.0

    def project_keys(self, images):
        """Unit projections float32 `[n, ...]` of uint8 `[n, S, S, 3]`."""
        return self.momentum_encoder.project(images, training=True)

    def keys(self, batch, names):
        """Computes the keys of several views of the global batch, in its order.

        Args:
            batch: see `Method`.
            names: names of the views.

        Returns:
            dictionary, name -> float32 `[G, ...]`.
        """
        return {
            name: collectives.gather(
                self.micro_batches(self.project_keys, batch[name])
            )
            for name in names
        }

    def shuffled_keys(self, batch, names):
        """Like `keys`, but encodes in random order (ShuffleBN).

        The batch statistics of a key then carry no information about its query.
        The keys are returned in the order of the batch. The views must be
        declared with `shuffle`.
        """
        images, order = {}, {}
        for name in names:
            images[name], order[name] = self._shuffled(batch, name)
        return {
            name: tf.scatter_nd(
                collectives.gather(order[name])[:, tf.newaxis],
                keys,
                tf.shape(keys),
            )
            for name, keys in self.keys(images, names).items()
        }

    def _shuffled(self, batch, name):
        """A view's images in random order, and the example of each."""
        order = batch[f"{name}_order"]
        if f"{name}_shuffled" in batch:
            return batch[f"{name}_shuffled"], order
        views = {view.name: view for view in self.views(self.options)}
        loaders = collectives.num_loaders()
        if loaders == 1 and not views[name].both_orders:
            return batch[name], order  # already permuted by the loader
        config = self.config
        parts = config.accumulation_steps * splits_on_replica(config)
        together = collectives.num_replicas() * parts == 1
        if together or config.batch_norm == "sync":
            # All orders give the same statistics.
            return batch[name], batch["example_ids"]
        return collectives.exchange(batch[name], order), order

    def make_queue(self, number=0):
        """Returns a `KeyQueue` for keys; `number` varies its initial keys."""
        return KeyQueue(
            self.options.queue_size,
            self.options.projection_size,
            seed=self.config.seed + number,
        )


class PredictorMethod(MomentumMethod):
    """A momentum method that predicts its targets, as BYOL and MoCo v3 do.

    Attributes:
        predictor: `keras.Model`, projections -> predictions, both `[N, D]`.
    """

    def __init__(self, *args):
        """See `Method`."""
        super().__init__(*args)
        self.predictor = heads.build(
            self.predictor_head,
            self.options.projection_size,
            bn_kind=self.config.batch_norm,
            bn_splits=splits_on_replica(self.config),
            seed=self.config.seed,
            name="predictor/head",
        )

    @property
    def predictor_head(self):
        """The `Head` of the predictor; by default that of the projection."""
        return self.options.head

    @property
    def learned(self):
        """Trainable variables of the encoder and of the predictor."""
        return [*super().learned, *self.predictor.trainable_variables]

    def predictions(self, images):
        """Unit predictions float32 `[n, D]` of uint8 `[n, S, S, 3]`."""
        features = self.encoder(images, training=True)
        # The predictor's input is not normalised; its output is.
        projections = self.encoder.heads[0](features, training=True)
        return unit(self.predictor(projections, training=True))


def keys_per_step(config):
    """Number of keys that each step stores in a queue.

    Args:
        config: `clsa_tf.config.Config` of a method with `--queue_size`.
    """
    views = 2 if getattr(config.options, "symmetric", False) else 1
    return config.batch_size * views


def check_queue(config):
    """Raises `UserError` for a queue smaller than the keys of one step.

    Args:
        config: `clsa_tf.config.Config` of a method with `--queue_size`.
    """
    stored, size = keys_per_step(config), config.options.queue_size
    if size != AUTO and size < stored:
        raise UserError(
            f"Expected --queue_size of at least {stored}, the number of keys "
            f"per step, received --queue_size={size}; raise --queue_size or "
            "lower --batch_size."
        )
