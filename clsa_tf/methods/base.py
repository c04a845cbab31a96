"""What every method is, and the one training step."""

import tensorflow as tf
from tensorflow import keras

from clsa_tf import losses
from clsa_tf.augment.chain import finish_batch
from clsa_tf.distributed import collectives
from clsa_tf.methods import gradients, statistics
from clsa_tf.methods.gradients import flat, in_parts
from clsa_tf.networks import precision
from clsa_tf.networks.encoder import Encoder
from clsa_tf.options.fields import unresolved


class Method(keras.Model):
    """A way to learn an encoder without labels.

    A method answers four questions: what it sees (`views`), what it compares
    with (`targets`, without gradient), what it makes of an image (`embed`,
    with gradient) and how good that is (`compare`); and it remembers
    (`update`). Everything that must survive a restart is a variable of it.

    Attributes:
        encoder: the `Encoder` that is being learned.
        config: the `Config` it was made from.
        total_steps: of the run, for schedules.
        precision: of the convolutions, see `clsa_tf.networks.precision`.
        steps_taken: int64 variable; the position in the data follows from it.
    """

    # Whether `compare` has to see the embeddings of the whole batch at once,
    # because their gradients depend on one another.
    whole_batch = False
    # Whose batch statistics the method is made for: those of the "whole" batch,
    # or of "parts" of it, because a query and its key are not to share them.
    batch_statistics = "whole"
    # Of the contrast; and what `useless` is, in the announcement's words.
    unit = "nats"
    useless_words = (
        "the contrast of an encoder that tells nothing apart is {:.2f} nats"
    )

    def __init__(self, config, *, total_steps=1):
        """Creates the encoder.

        Args:
            config: `clsa_tf.config.Config` whose `method` is this one; see
                `clsa_tf.training.auto.resolve`.
            total_steps: of the run.

        Raises:
            ValueError: an option is still `auto`.
        """
        auto = unresolved(config) + unresolved(config.options)
        if auto:
            raise ValueError(
                f"Expected values of {', '.join(auto)}, received auto; call "
                "clsa_tf.training.auto.resolve first."
            )
        super().__init__(name=config.method)
        # `train_step` averages its reports itself; Keras would add them up.
        self.distribute_reduction_method = "first"
        self.config = config
        self.total_steps = total_steps
        self.precision = precision.resolve(config.precision)
        self.encoder = self.make_encoder("encoder")
        # Its own, so that the position in the data hangs on no optimizer.
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
        """Contrast of an encoder that has learned nothing."""
        raise NotImplementedError

    def make_encoder(self, name):
        """Returns an `Encoder` called `name` that computes as this run does."""
        return make_encoder(self.config, name=name, precision=self.precision)

    @property
    def options(self):
        """The method's own options."""
        return self.config.options

    @property
    def learned(self):
        """Variables that the optimizer changes."""
        return self.encoder.trainable_variables

    def names(self, prefix):
        """Names of the views that begin with `prefix`."""
        views = self.views(self.options)
        return [view.name for view in views if view.name.startswith(prefix)]

    def targets(self, batch):
        """What is compared with; called outside the gradient tape.

        Args:
            batch: dictionary, view name -> uint8 `[N, H, W, 3]`, and `"rows"`
                int32 `[N]`, each example's row in the global batch.

        Returns:
            whatever `compare` and `update` take, for the global batch.
        """
        return None

    def embed(self, batch):
        """Embeddings of the views that are learned from, with gradient.

        Args:
            batch: see `targets`; of a micro-batch.

        Returns:
            dictionary, view name -> float32 `[n, D]`.
        """
        raise NotImplementedError

    def compare(self, embedded, targets, rows):
        """The loss of each example.

        Args:
            embedded: what `embed` returned; of a micro-batch or, if
                `whole_batch`, of the replica's whole batch.
            targets: what `targets` returned.
            rows: int32 `[n]`, each example's row in the global batch.

        Returns:
            float32 `[n]`, and a dictionary of float32 `[n]` to report.
        """
        raise NotImplementedError

    def embeddings(self, targets, embedded):
        """Unit vectors float32 `[G, D]` in which to look for a collapse.

        Of the global batch and of one encoder.

        Args:
            targets: what `targets` returned.
            embedded: what `embed` returned, if `whole_batch`; else None.
        """
        raise NotImplementedError

    def update(self, targets):
        """Changes the method's own state after the optimizer's step."""

    def project_all(self, network, batch, names):
        """Unit projections of several views.

        Args:
            network: function of uint8 `[n, S, S, 3]` -> float32 `[n, ...]`.
            batch: dictionary, view name -> uint8 `[n, S, S, 3]`.
            names: of the views.

        Returns:
            dictionary, name -> float32 `[n, ...]`.
        """
        if not self.options.join_crops:
            # One pass per crop: each has its own batch statistics.
            return {name: network(batch[name]) for name in names}
        found, sizes = {}, {}
        for name in names:
            sizes.setdefault(batch[name].shape[1], []).append(name)
        for group in sizes.values():
            joined = self._join([batch[name] for name in group])
            found |= zip(group, self._separate(network(joined), len(group)))
        return {name: found[name] for name in names}

    def _join(self, crops):
        """`[n, ...]` each -> `[V n, ...]`: part by part of the statistics.

        With `--batch_norm=split` the parts of all crops that other replicas
        would normalise together have to lie side by side.
        """
        parts = bn_splits(self.config)
        rows = [in_parts(x, parts) for x in crops]
        return flat(tf.concat(rows, axis=1))

    def _separate(self, rows, crops):
        parts = tf.split(in_parts(rows, bn_splits(self.config)), crops, axis=1)
        return [flat(part) for part in parts]

    def shuffle(self, images, purpose):
        """Rows of the global batch in a random order, exchanged.

        MoCo's shuffled batch normalisation for views that are needed in both
        orders (the loader shuffles those that are needed in one).

        Args:
            images: uint8 `[N, H, W, 3]` on each replica.
            purpose: int that tells this order from others of the same step.

        Returns:
            uint8 `[N, H, W, 3]`, and int32 `[N]`, the row that each shows.
        """
        size = images.shape[0]
        own = collectives.positives(size)
        parts = self.config.accumulation_steps * bn_splits(self.config)
        together = collectives.num_replicas() * parts == 1
        if together or self.config.batch_norm == "sync":
            return images, own  # any order gives the same statistics
        seed = tf.stack([self.config.seed + purpose, self.steps_taken])
        # Not `stateless_shuffle`, which XLA does not compile.
        order = tf.argsort(
            tf.random.stateless_uniform(
                [size * collectives.num_replicas()], seed
            )
        )
        rows = tf.gather(order, own)
        return collectives.exchange(images, rows), rows

    def divergence(self, weak, strong):
        """DDM of an example's weak and strong views, and reports on it.

        Args:
            weak: list of float `[n, C]`, the teachers' similarities.
            strong: list of float `[n, C]`, the students'.

        Returns:
            float32 `[n]`, weighted; dictionary of float32 `[n]`.
        """
        options = self.options
        ddm = losses.ddm(weak, strong, temperature=options.ddm_temperature)
        floor = len(strong) * losses.teacher_entropy(
            weak, temperature=options.ddm_temperature
        )
        if options.over_crops == "mean":
            pairs = len(weak) * len(strong)
            ddm, floor = ddm / pairs, floor / pairs
        return options.ddm_weight * ddm, {"ddm": ddm, "ddm_kl": ddm - floor}

    def in_parts(self, function, images):
        """Applies `function` to each micro-batch of `images`, without gradient.

        Args:
            function: of one micro-batch -> float32 `[n, ...]`.
            images: uint8 `[N, H, W, 3]`, or a dictionary of `[N, ...]`.

        Returns:
            float32 `[N, ...]`.
        """
        parts = self.config.accumulation_steps
        if parts == 1:
            return function(images)
        outputs = tf.map_fn(
            function,
            tf.nest.map_structure(lambda x: in_parts(x, parts), images),
            fn_output_signature=tf.float32,
            parallel_iterations=1,
        )
        return flat(outputs)

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
        found = gradients.of_batch(self, batch, targets)
        by_weights, reports, embedded = found
        self.optimizer.apply_gradients(zip(by_weights, self.learned))
        reports |= statistics.measures(self.embeddings(targets, embedded))
        self.update(targets)
        self.steps_taken.assign_add(1)
        return collectives.mean(reports)

    def _complete(self, batch):
        """Finishes views, exchanges shuffled ones, numbers the rows."""
        views = self.views(self.options)
        if self.config.augment_on == "device":
            batch = finish_batch(batch, views=views)
        own = collectives.positives(batch[views[0].name].shape[0])
        batch = batch | {"rows": own}
        # No loader has the images to permute the rows of the global batch.
        for view in views if collectives.num_loaders() > 1 else []:
            name, rows = view.name, f"{view.name}_rows"
            if view.shuffle and self.config.batch_norm == "sync":
                batch[rows] = own  # any order gives the same statistics
            elif view.shuffle:
                batch[name] = collectives.exchange(batch[name], batch[rows])
        return batch


def recognised(queries, keys, rows):
    """Whether the nearest of all keys is a row's own: float32 `[n]`, 0 or 1.

    Args:
        queries: float32 `[n, D]`, unit rows, of one view.
        keys: float32 `[G, D]`, unit rows, of another view.
        rows: int32 `[n]`, row of each query in the global batch.
    """
    nearest = tf.argmax(losses.cosines(queries, keys), 1, tf.int32)
    return tf.cast(nearest == rows, tf.float32)


def bn_splits(config):
    """Parts of a replica's micro-batch with batch statistics of their own."""
    if config.batch_norm != "split":
        return 1
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    # Of the global batch: this many of them are in each micro-batch.
    parts = replicas * config.accumulation_steps
    return max(1, config.batch_norm_splits // parts)


def make_encoder(config, *, name, precision="float32"):
    """Returns the `Encoder` that `config` describes.

    Args:
        config: `clsa_tf.config.Config`.
        precision: of its convolutions, see `clsa_tf.networks.precision`;
            variables are float32 whatever it is.
        name: of the model; does not change its initial weights.
    """
    options = config.options
    return Encoder(
        backbone=config.backbone,
        width=config.width,
        stem=config.stem,
        head=options.head,
        heads=options.heads,
        concatenate=options.concatenate,
        bn_kind=config.batch_norm,
        bn_splits=bn_splits(config),
        seed=config.seed,
        precision=precision,
        name=name,
    )
