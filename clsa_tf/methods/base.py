"""What every method is, and the one training step."""

import tensorflow as tf
from tensorflow import keras

from clsa_tf import collapse, distribute, precision
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
        precision: of the convolutions, see `clsa_tf.precision`.
        steps_taken: int64 variable; the position in the data follows from it.
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
        self.precision = precision.resolve(config.precision)
        self.encoder = self.make_encoder("encoder")
        # Not the optimizer's count, which loss scaling holds back.
        self.steps_taken = tf.Variable(
            tf.zeros([], tf.int64),
            trainable=False,
            name="steps_taken",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    @classmethod
    def views(cls, options):
        """Returns the list of `View`s that a batch has to hold."""
        raise NotImplementedError

    @classmethod
    def useless(cls, config):
        """Contrast, in nats, of an encoder that tells no images apart."""
        raise NotImplementedError

    def make_encoder(self, name):
        """Returns an `Encoder` called `name` that computes as this run does."""
        return make_encoder(self.config, name=name, precision=self.precision)

    @property
    def learned(self):
        """Variables that the optimizer changes."""
        return self.encoder.trainable_variables

    def targets(self, batch):
        """What the objective compares with; called outside the gradient tape.

        Args:
            batch: dictionary, view name -> uint8 `[N, H, W, 3]`, and what
                `objective` gets beside them.

        Returns:
            whatever `objective` and `update` take.
        """
        return None

    def objective(self, batch, targets):
        """The loss of each example; called for each micro-batch.

        Args:
            batch: dictionary, view name -> uint8 `[n, H, W, 3]`, and `"rows"`
                int32 `[n]`, each example's row in the global batch.
            targets: what `targets` returned, for the global batch.

        Returns:
            float32 `[n]`, and a dictionary of float32 `[n]` to report.
        """
        raise NotImplementedError

    def embeddings(self, targets):
        """Unit vectors float32 `[G, D]` in which to look for a collapse.

        Of the global batch and of one encoder.
        """
        return targets

    def update(self, targets):
        """Changes the method's own state after the optimizer's step."""

    def in_parts(self, function, images):
        """Applies `function` to each micro-batch of `images`, without gradient.

        Args:
            function: uint8 `[n, H, W, 3]` -> float32 `[n, D]`.
            images: uint8 `[N, H, W, 3]`.

        Returns:
            float32 `[N, D]`.
        """
        parts = self.config.accumulation_steps
        if parts == 1:
            return function(images)
        outputs = tf.map_fn(
            function,
            _in_parts(images, parts),
            fn_output_signature=tf.float32,
            parallel_iterations=1,
        )
        return tf.reshape(outputs, [-1, outputs.shape[-1]])

    def train_step(self, batch):
        """One step on one replica; Keras calls it.

        Args:
            batch: dictionary, view name -> uint8 `[N, H, W, 3]`; with
                `--augment_on=device` unfinished (see `training_batches`).

        Returns:
            dictionary of float32 scalars, means over the global batch.
        """
        batch = self._complete(batch)
        targets = self.targets(batch)
        gradients, reports = self._accumulated(batch, targets)
        self.optimizer.apply_gradients(zip(gradients, self.learned))
        reports |= collapse.measures(self.embeddings(targets))
        self.update(targets)
        self.steps_taken.assign_add(1)
        return distribute.mean(reports)

    def _complete(self, batch):
        """Finishes views, exchanges shuffled ones, numbers the rows."""
        views = self.views(self.config.options)
        if self.config.augment_on == "device":
            batch = finish_batch(batch, views=views)
        own = distribute.positives(batch[views[0].name].shape[0])
        batch = batch | {"rows": own}
        if distribute.num_loaders() == 1:
            return batch
        # No loader has the images to permute the rows of the global batch.
        for view in views:
            name, rows = view.name, f"{view.name}_rows"
            if view.shuffle and self.config.batch_norm == "sync":
                batch[rows] = own  # any order gives the same statistics
            elif view.shuffle:
                batch[name] = distribute.exchange(batch[name], batch[rows])
        return batch

    def _accumulated(self, batch, targets):
        """Gradients and mean reports, summed over the micro-batches."""
        parts = self.config.accumulation_steps
        if parts == 1:
            return self._gradients(batch, targets)
        parts_of = {k: _in_parts(x, parts) for k, x in batch.items()}

        def part(i):
            taken = {k: tf.gather(x, i) for k, x in parts_of.items()}
            return self._gradients(taken, targets)

        def add(i, total):
            return i + 1, tf.nest.map_structure(tf.add, total, part(i))

        # A loop, so that no two micro-batches are in memory at a time.
        _, total = tf.while_loop(
            lambda i, _: i < parts, add, (1, part(0)), parallel_iterations=1
        )
        return tf.nest.map_structure(lambda x: x / parts, total)

    def _gradients(self, batch, targets):
        """Gradients and mean reports of one micro-batch."""
        scaling = isinstance(
            self.optimizer, keras.mixed_precision.LossScaleOptimizer
        )
        with tf.GradientTape() as tape:
            losses, reports = self.objective(batch, targets)
            # The optimizer sums gradients over replicas: divided by their
            # number the result is the gradient of the global batch's mean.
            loss = tf.reduce_mean(losses) / distribute.num_replicas()
            if scaling:
                loss = self.optimizer.get_scaled_loss(loss)
        gradients = tape.gradient(loss, self.learned)
        if scaling:
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        reports = {"loss": losses} | reports
        return gradients, {k: tf.reduce_mean(x) for k, x in reports.items()}


def _in_parts(rows, parts):
    """`[N, ...]` -> `[parts, N / parts, ...]`."""
    return tf.reshape(rows, [parts, rows.shape[0] // parts, *rows.shape[1:]])


def make_encoder(config, *, name, precision="float32"):
    """Returns the `Encoder` that `config` describes.

    Args:
        config: `clsa_tf.config.Config`.
        precision: of its convolutions, see `clsa_tf.precision`; variables are
            float32 whatever it is.
        name: of the model; does not change its initial weights.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    parts = replicas * config.accumulation_steps
    return Encoder(
        backbone=config.backbone,
        width=config.width,
        stem=config.stem,
        projection_size=config.options.projection_size,
        bn_kind=config.batch_norm,
        # Of the global batch: this many of them are in each micro-batch.
        bn_splits=max(1, config.batch_norm_splits // parts),
        seed=config.seed,
        precision=precision,
        name=name,
    )
