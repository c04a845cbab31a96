"""What every method is, and the one training step."""

import tensorflow as tf
from tensorflow import keras

from clsa_tf import distribute
from clsa_tf.augment.chain import finish_batch
from clsa_tf.networks.encoder import Encoder


class Method(keras.Model):
    """A way to learn an encoder without labels.

    A method answers three questions: what it sees (`views`), what it compares
    (`targets`, without gradient, and `objective`), and what it remembers
    (`update`). Everything that must survive a restart is a variable of it.

    Attributes:
        encoder: the `Encoder` that is being learned.
        config: the `Config` it was made from.
    """

    def __init__(self, config):
        """Creates the encoder.

        Args:
            config: `clsa_tf.config.Config` whose `method` is this one.
        """
        super().__init__(name=config.method)
        # `train_step` averages its reports itself; Keras would add them up.
        self.distribute_reduction_method = "first"
        self.config = config
        self.encoder = make_encoder(config, name="encoder")

    @classmethod
    def views(cls, options):
        """Returns the list of `View`s that a batch has to hold."""
        raise NotImplementedError

    @classmethod
    def useless(cls, config):
        """Contrast, in nats, of an encoder that tells no images apart."""
        raise NotImplementedError

    @property
    def learned(self):
        """Variables that the optimizer changes."""
        return self.encoder.trainable_variables

    def targets(self, batch):
        """What the objective compares with; called outside the gradient tape.

        Args:
            batch: dictionary, view name -> uint8 `[N, H, W, 3]`.

        Returns:
            whatever `objective` and `update` take.
        """
        return None

    def objective(self, batch, targets):
        """The loss of each example.

        Args:
            batch: dictionary, view name -> uint8 `[N, H, W, 3]`.
            targets: what `targets` returned.

        Returns:
            float32 `[N]`, and a dictionary of float32 `[N]` to report.
        """
        raise NotImplementedError

    def update(self, targets):
        """Changes the method's own state after the optimizer's step."""

    def train_step(self, batch):
        """One step on one replica; Keras calls it.

        Args:
            batch: dictionary, view name -> uint8 `[N, H, W, 3]`; with
                `--augment_on=device` unfinished (see `training_batches`).

        Returns:
            dictionary of float32 scalars, means over the global batch.
        """
        if self.config.augment_on == "device":
            views = self.views(self.config.options)
            batch = finish_batch(batch, views=views)
        targets = self.targets(batch)
        with tf.GradientTape() as tape:
            losses, reports = self.objective(batch, targets)
            # The optimizer sums gradients over replicas: divided by their
            # number the result is the gradient of the global batch's mean.
            loss = tf.reduce_mean(losses) / distribute.num_replicas()
        gradients = tape.gradient(loss, self.learned)
        self.optimizer.apply_gradients(zip(gradients, self.learned))
        self.update(targets)
        reports = {"loss": losses} | reports
        return distribute.mean(
            {name: tf.reduce_mean(x) for name, x in reports.items()}
        )


def make_encoder(config, *, name):
    """Returns the `Encoder` that `config` describes.

    Args:
        config: `clsa_tf.config.Config`.
        name: of the model; does not change its initial weights.
    """
    return Encoder(
        backbone=config.backbone,
        width=config.width,
        stem=config.stem,
        projection_size=config.options.projection_size,
        bn_kind=config.batch_norm,
        bn_splits=config.batch_norm_splits,
        seed=config.seed,
        name=name,
    )
