"""What methods with a momentum encoder have in common."""

import math

import tensorflow as tf

from clsa_tf.distributed import collectives
from clsa_tf.errors import UserError
from clsa_tf.methods.base import Method, bn_splits
from clsa_tf.methods.key_queue import KeyQueue
from clsa_tf.networks import heads
from clsa_tf.networks.encoder import unit
from clsa_tf.options.fields import AUTO


class MomentumMethod(Method):
    """A method whose targets come from a moving average of its encoder.

    Attributes:
        key_encoder: the moving average; its batch normalisation runs with
            batch statistics, and nothing but `update` changes its weights.
    """

    def __init__(self, config, **kwargs):
        """See `Method`."""
        super().__init__(config, **kwargs)
        self.key_encoder = self.make_encoder("key_encoder")
        for key, query in zip(
            self.key_encoder.variables, self.encoder.variables
        ):
            key.assign(query)

    def make_queue(self, number=0):
        """Returns a `KeyQueue` for the method's keys, the `number`-th."""
        return KeyQueue(
            self.options.queue_size,
            self.options.projection_size,
            seed=self.config.seed + number,
        )

    def update(self, targets):
        """Moves the key encoder towards the encoder."""
        collectives.moving_average(
            self.key_encoder.trainable_variables,
            self.encoder.trainable_variables,
            self.momentum,
        )

    def momentum(self):
        """The m of the present step, float or float32 scalar.

        Scheduled, it is `1 - (1 - m) (cos(pi k / K) + 1) / 2` at step k of K.

        Source: google-deepmind/deepmind-research, byol/utils/schedules.py.
        """
        start = self.options.key_momentum
        if self.options.key_momentum_schedule == "constant":
            return start
        done = tf.cast(self.steps_taken, tf.float32) / self.total_steps
        done = tf.minimum(done, 1.0)
        return 1.0 - (1.0 - start) * (tf.cos(math.pi * done) + 1.0) / 2.0

    def project_keys(self, images):
        """Unit projections float32 `[n, ...]` of uint8 `[n, S, S, 3]`."""
        return self.key_encoder.project(images, training=True)

    def gathered_keys(self, batch, names):
        """Keys of several views of the global batch, in its order.

        Args:
            batch: dictionary with the views.
            names: of the views.

        Returns:
            dictionary, name -> float32 `[G, ...]`.
        """
        return {
            name: collectives.gather(
                self.in_parts(self.project_keys, batch[name])
            )
            for name in names
        }

    def shuffled_keys(self, batch, names):
        """As `gathered_keys`, but encoded in a random order, then put back.

        So that a key's batch statistics say nothing about its query. Views
        that the loader shuffled have `"<name>_rows"` in the batch.
        """
        images, rows = {}, {}
        for purpose, name in enumerate(names):
            images[name], rows[name] = batch[name], batch.get(f"{name}_rows")
            if rows[name] is None:
                images[name], rows[name] = self.shuffle(batch[name], purpose)
        return {
            name: tf.scatter_nd(
                collectives.gather(rows[name])[:, tf.newaxis],
                keys,
                tf.shape(keys),
            )
            for name, keys in self.gathered_keys(images, names).items()
        }


def keys_per_step(config):
    """How many keys each step stores in a queue.

    Args:
        config: `clsa_tf.config.Config` of a method with `--queue_size`.
    """
    views = 2 if getattr(config.options, "symmetric", False) else 1
    return config.batch_size * views


def check_queue(config):
    """Raises `UserError` for a queue that one step's keys do not fit into.

    Args:
        config: `clsa_tf.config.Config` of a method with `--queue_size`.
    """
    stored, size = keys_per_step(config), config.options.queue_size
    if size != AUTO and size < stored:
        raise UserError(
            f"Expected a queue at least as long as the {stored} keys of a "
            "global batch, received "
            f"--queue_size={size}; lengthen it or lower --batch_size."
        )


class PredictorMethod(MomentumMethod):
    """A momentum method that predicts its targets: BYOL, MoCo v3.

    Attributes:
        predictor: `keras.Model`, projections -> predictions, both `[N, D]`.
    """

    def __init__(self, config, **kwargs):
        """See `Method`."""
        super().__init__(config, **kwargs)
        self.predictor = self.make_predictor(self.predictor_head)

    @property
    def predictor_head(self):
        """The `Head` of the predictor: the projector's again."""
        return self.options.head

    def make_predictor(self, head):
        """Returns the predictor: `head` on top of the projection."""
        return heads.build(
            head,
            self.options.projection_size,
            bn_kind=self.config.batch_norm,
            bn_splits=bn_splits(self.config),
            seed=self.config.seed,
            name="predictor/head",
        )

    @property
    def learned(self):
        """The encoder's and the predictor's variables."""
        return (
            self.encoder.trainable_variables
            + self.predictor.trainable_variables
        )

    def predict_images(self, images):
        """Unit predictions float32 `[n, D]` of uint8 `[n, S, S, 3]`."""
        features = self.encoder(images, training=True)
        # Not the unit projection: that is only what is predicted.
        projections = self.encoder.heads[0](features, training=True)
        return unit(self.predictor(projections, training=True))
