"""The base class of all methods, with the training step that they share."""

import dataclasses

import tensorflow as tf
from tensorflow import keras

from clsa_tf import losses
from clsa_tf.augment.chain import complete_batch
from clsa_tf.augment.views import shuffled_copy
from clsa_tf.distributed import collectives
from clsa_tf.losses.contrast import top1
from clsa_tf.methods import gradients, statistics
from clsa_tf.methods.gradients import flat, in_parts
from clsa_tf.networks import precision
from clsa_tf.networks.batchnorm import splits_on_replica
from clsa_tf.networks.encoder import make_encoder, unit
from clsa_tf.options.fields import unresolved


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Facts about the run that a method may use.

    Attributes:
        num_images: images in the training set.
        num_classes: classes in the training set; 0 without labels.
        steps_per_epoch: steps per epoch.
        total_steps: steps of the whole run, used by schedules.
    """

    num_images: int = 0
    num_classes: int = 0
    steps_per_epoch: int = 1
    total_steps: int = 1

    @classmethod
    def of(cls, config, *, images, classes):
        """Returns the `RunInfo` of a run.

        Args:
            config: `clsa_tf.config.Config`.
            images: number of training images.
            classes: number of their classes; 0 without labels.
        """
        return cls(
            num_images=images,
            num_classes=classes,
            steps_per_epoch=config.steps_per_epoch(images),
            total_steps=config.total_steps(images),
        )


class Method(keras.Model):
    """Base class of the methods; each subclass trains an encoder in one way.

    The training step calls, in this order:

    1. `targets(batch)`, without gradient;
    2. `forward(batch)`, with gradient;
    3. `loss(outputs, targets, batch)`;
    4. `transform_gradients(gradients, step)`, then the optimizer;
    5. `update(batch, targets, outputs)`.

    A subclass must define `views`, `forward` and `loss`, and
    `collapse_projections` if its default does not find projections in the
    outputs. All other members have defaults. If the method has a measure of
    success in [0, 1], such as the share of queries that recognise their key,
    `loss` must report it as `contrast_accuracy`. All state that must survive a
    restart has to be in variables of the method.

    Variables must stay equal on all replicas, because a checkpoint holds one
    copy. TensorFlow does not check this: each replica writes its own copy. So
    whatever `update` stores has to come from the whole global batch
    (`collectives.gather`).

    `Options` inherits `groups.Projection`, which describes the encoder's head
    (`make_encoder` reads it), and `groups.AugmentationOptions`, which
    describes views (`AugmentationOptions.view`).

    A batch is a dictionary:

    * view name -> uint8 `[n, S, S, 3]`, for each of `views`;
    * `"example_ids"`, int32 `[n]`: position of each example in the global
      batch;
    * `"index"`, int64 `[n]`: number of each example's record in the dataset,
      the same in every epoch, after a restart and on every worker. Missing if
      the source is a stream; a method that needs it sets `needs_index`;
    * `"label"`, int64 `[n]`: class of each example. Missing if there are no
      labels; a method that needs it sets `needs_label`.

    Attributes:
        encoder: the trained `Encoder`.
        config: the `Config` that the method was made from.
        run: `RunInfo`.
        precision: Keras policy of the convolutions, see
            `clsa_tf.networks.precision`.
        steps_taken: int64 variable, from which the position in the data
            follows.
    """

    # Whether `loss` needs the outputs of the whole batch at once, because the
    # loss of one example depends on the outputs of others.
    whole_batch = False
    needs_index = False
    needs_label = False
    # Batch statistics that the method needs: of the "whole" batch, or of
    # "parts" of it, if a query must not share them with its key.
    batch_statistics = "whole"
    # Unit of the loss; text that prints `chance_loss`, if it is known, when
    # training starts.
    loss_unit = "nats"
    chance_text = "chance-level loss: {:.2f} nats"
    # Variables that `loss` itself uses and trains, such as prototypes.
    loss_variables = ()

    def __init__(self, config, run=RunInfo()):
        """Creates the encoder.

        Args:
            config: `clsa_tf.config.Config` of this method, without `auto`
                values; see `clsa_tf.training.auto.resolve`.
            run: `RunInfo`.

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
        # `train_step` averages its reports itself; Keras would sum them.
        self.distribute_reduction_method = "first"
        self.config = config
        self.run = run
        self.precision = precision.resolve(config.precision)
        self.encoder = self.make_encoder("encoder")
        # Separate from the optimizer's counter, so that the position in the
        # data does not depend on the optimizer.
        self.steps_taken = tf.Variable(
            tf.zeros([], tf.int64),
            trainable=False,
            name="steps_taken",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def compile(self, optimizer, **kwargs):
        """See `keras.Model.compile`; the method has its own loss."""
        super().compile(optimizer=optimizer, **kwargs)
        # Keras stores its `loss` argument here, which would hide our `loss`.
        del self.loss

    # ---- Methods to define or override in a subclass

    @classmethod
    def views(cls, options):
        """Returns the `View`s of a batch, a list."""
        raise NotImplementedError

    @classmethod
    def variant(cls, options):
        """Returns the class that trains with these options.

        The default is this class. A subclass can keep a rarely used option out
        of its own code this way, see `clsa_tf.methods.symmetric`.
        """
        return cls

    @classmethod
    def chance_loss(cls, config):
        """Returns the chance-level loss, of an encoder that learned nothing.

        None, the default, means unknown; no message or picture shows it then.
        """
        return None

    @classmethod
    def advice(cls, config):
        """Lists settings of this method that do harm but can be run.

        Args:
            config: `Config`, without `auto` values.

        Returns:
            list of sentences, each with a remedy, printed when training starts.
        """
        return []

    @classmethod
    def resolve_auto(cls, config, run):
        """Chooses values of the method's own options that are `auto`.

        `clsa_tf.training.auto` resolves all others, `queue_size` and
        `key_momentum`, before it calls this.

        Args:
            config: `Config`; only the method's own options may be `auto`.
            run: `RunInfo`.

        Returns:
            dict, name of an option -> value. Values of options that are not
            `auto` are ignored.
        """
        return {}

    def targets(self, batch):
        """Computes the targets of `loss`, outside the gradient tape.

        Args:
            batch: the replica's batch, see the class.

        Returns:
            any structure of tensors. `loss` finds the rows of its examples with
            `own_rows` if they are those of the global batch, `[G, ...]`
            (`collectives.gather`), or of the replica's batch, `[N, ...]`, in
            the order of the batch.
        """
        return None

    def forward(self, batch):
        """Computes the outputs through which the gradient flows.

        Args:
            batch: see the class; with `--accumulation_steps`, a micro-batch.

        Returns:
            any structure of tensors `[n, ...]`, such as a dictionary from view
            names to projections.
        """
        raise NotImplementedError

    def loss(self, outputs, targets, batch):
        """Computes the loss of each example.

        The only variables that it may use are `loss_variables`. With
        `whole_batch` and `--accumulation_steps`, gradients are taken with
        respect to `outputs` and these variables only.

        Args:
            outputs: result of `forward`, for a micro-batch or, with
                `whole_batch`, for the replica's whole batch.
            targets: result of `targets`, of the whole batch even if `outputs`
                are those of a micro-batch. `own_rows(rows,
                batch["example_ids"])` are the rows that belong to `outputs`.
            batch: the same examples as `outputs`.

        Returns:
            float32 `[n]`, the loss, and a dictionary of float32 `[n]` to
            report.
        """
        raise NotImplementedError

    def transform_gradients(self, gradients, step):
        """Changes the gradients before the optimizer applies them.

        Args:
            gradients: list of tensors, one for each of `learned`: gradients of
                the mean loss of the global batch, equal on all replicas.
            step: int64 scalar tensor, number of steps taken before this one.

        Returns:
            list of the same length.
        """
        return gradients

    def update(self, batch, targets, outputs):
        """Updates the method's own state after the optimizer's step.

        The state has to be the same on all replicas, see the class.

        Args:
            batch: the replica's batch.
            targets: result of `targets`.
            outputs: result of `forward`, for the replica's whole batch.
        """

    def on_epoch_begin(self, epoch, features):
        """Runs before the first step of each epoch, outside the graph.

        Results must be stored in variables. A run that resumes within an epoch
        restores them and does not call this again. A signal cancels the call,
        and the next start repeats it with the same weights.

        Every worker calls this by itself, and nothing is broadcast. So the
        results may depend on `features`, the epoch and `config.seed` only.
        `features` needs a dataset with random access: a method that calls it
        sets `needs_index`.

        Args:
            epoch: int, from 0.
            features: function. `features()` returns float32
                `[num_images, F]`, the features of all images from `encoder`, in
                the order of `"index"`. `features(encoder=x, projections=True)`
                uses another `Encoder` of the method, and returns projections
                instead of features. Rows of unreadable images are zero. All
                workers must call it.
        """

    def collapse_projections(self, targets, outputs):
        """Returns the projections in which a collapse is looked for.

        They must come from one encoder. The default uses the outputs if they
        are a tensor `[n, D]`, or those of the first of `views` in a dictionary.

        Args:
            targets: result of `targets`.
            outputs: result of `forward`.

        Returns:
            float32 `[G, D]`, unit rows, of the global batch.

        Raises:
            NotImplementedError: the default finds no projections.
        """
        rows = outputs
        if isinstance(outputs, dict):
            rows = outputs.get(self.view_names()[0])
        if not tf.is_tensor(rows) or rows.shape.rank != 2:
            raise NotImplementedError(
                f"Expected projections [n, D] of {self.view_names()[0]} from "
                f"`forward` of {type(self).__name__}, received {outputs}; "
                "define `collapse_projections`."
            )
        return collectives.gather(unit(rows))

    # ---- Tools for subclasses

    def make_encoder(self, name):
        """Returns an `Encoder` called `name`, in the precision of this run."""
        return make_encoder(self.config, name=name, precision=self.precision)

    @property
    def options(self):
        """The method's own options."""
        return self.config.options

    @property
    def learned(self):
        """Variables that the optimizer trains."""
        return [*self.encoder.trainable_variables, *self.loss_variables]

    def view_names(self, prefix=""):
        """Names of the views, those that begin with `prefix`."""
        views = self.views(self.options)
        return [view.name for view in views if view.name.startswith(prefix)]

    def project(self, images):
        """Unit projections float32 `[n, D]` of uint8 `[n, S, S, 3]`."""
        return self.encoder.project(images, training=True)

    def encode_views(self, network, batch, names):
        """Applies a network to several views.

        Args:
            network: function, uint8 `[n, S, S, 3]` -> float32 `[n, ...]`.
            batch: see the class.
            names: names of the views.

        Returns:
            dictionary, name -> float32 `[n, ...]`.
        """
        if not self.options.join_crops:
            # One pass per crop, so that each has its own batch statistics.
            return {name: network(batch[name]) for name in names}
        found, sizes = {}, {}
        for name in names:
            sizes.setdefault(batch[name].shape[1], []).append(name)
        for group in sizes.values():
            joined = self._join([batch[name] for name in group])
            found |= zip(group, self._separate(network(joined), len(group)))
        return {name: found[name] for name in names}

    def _join(self, crops):
        """Joins `V` crops `[n, ...]` into one batch `[V n, ...]`.

        With `--batch_norm=split`, each part of the batch holds the rows of all
        crops that one of several replicas would normalise together.
        """
        parts = splits_on_replica(self.config)
        rows = [in_parts(x, parts) for x in crops]
        return flat(tf.concat(rows, axis=1))

    def _separate(self, rows, crops):
        rows = in_parts(rows, splits_on_replica(self.config))
        return [flat(part) for part in tf.split(rows, crops, axis=1)]

    def divergence(self, weak, strong):
        """Computes the DDM of the weak and strong views, and its reports.

        Args:
            weak: list of float `[n, C]`, similarities of the weak views, the
                teachers.
            strong: list of float `[n, C]`, similarities of the strong views,
                the students.

        Returns:
            float32 `[n]`, multiplied by `--ddm_weight`; dictionary of float32
            `[n]`, without that factor.
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

    def micro_batches(self, function, batch):
        """Applies a function to each micro-batch in turn, without gradient.

        Args:
            function: maps a micro-batch to a structure of tensors `[n, ...]`.
            batch: structure of tensors `[N, ...]`.

        Returns:
            the same structure as `function`, of tensors `[N, ...]`.
        """
        parts = self.config.accumulation_steps
        return gradients.map_parts(function, batch, parts)

    # ---- The training step

    def train_step(self, batch):
        """Takes one training step on one replica; called by Keras.

        Args:
            batch: element of `training_batches`. With `--augment_on=device`
                part of the augmentation is still to be applied.

        Returns:
            dictionary of float32 scalars, means over the global batch.
        """
        before = gradients.state(self)
        batch = self._complete(batch)
        targets = self.targets(batch)
        found, reports, outputs = gradients.of_batch(self, batch, targets)
        found = self.transform_gradients(found, self.steps_taken)
        gradients.apply(self, found)
        reports |= statistics.measures(
            self.collapse_projections(targets, outputs)
        )
        self.update(batch, targets, outputs)
        gradients.undo_skipped(self, found, before)
        self.steps_taken.assign_add(1)
        return collectives.mean(reports)

    def _complete(self, batch):
        """Completes the augmentation and adds `"example_ids"`."""
        views = self.views(self.options)
        if self.config.augment_on == "device":
            copies = [shuffled_copy(view) for view in views]
            present = [v for v in [*views, *copies] if v.name in batch]
            batch = complete_batch(batch, views=present)
        size = batch[views[0].name].shape[0]
        return batch | {"example_ids": collectives.example_ids(size)}


def own_rows(rows, example_ids):
    """Rows of a batch that belong to some of its examples.

    Args:
        rows: `[G, ...]` of the global batch, or `[N, ...]` of the replica's
            batch, in the order of the batch.
        example_ids: int32 `[n]`, position of each example in the global batch:
            `"example_ids"` of a batch or micro-batch of this replica.

    Returns:
        `[n, ...]`.
    """
    # A replica's batch begins at a multiple of its size.
    return tf.gather(rows, example_ids % rows.shape[0])


def contrast_top1(queries, keys, example_ids):
    """Whether the nearest of all keys is the query's own.

    Args:
        queries: float32 `[n, D]`, unit rows, of one view.
        keys: float32 `[G, D]`, unit rows, of another view.
        example_ids: int32 `[n]`, position of each query in the global batch.

    Returns:
        float32 `[n]`, 0 or 1; 0 if another key is as near.
    """
    return top1(losses.cosines(queries, keys), example_ids)
