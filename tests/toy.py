"""A method for tests, which uses every part of the interface.

A bank with a row for each image, prototypes that the loss trains, class means
that are computed before each epoch, and labels.
"""

import dataclasses

import tensorflow as tf

from clsa_tf import methods
from clsa_tf.distributed import collectives
from clsa_tf.losses.products import all_pairs
from clsa_tf.methods.base import Method, own_rows
from clsa_tf.networks.encoder import unit
from clsa_tf.options import groups
from clsa_tf.options.fields import AUTO, Crop, option


@dataclasses.dataclass(frozen=True)
class Options(groups.Projection, groups.AugmentationOptions):
    """Flags of the toy method."""

    crop: Crop = option(Crop(224, 0.2, 1.0), "crop of both views")
    as_a_whole: bool = option(False, "the loss sees the whole batch at once")
    frozen_steps: int = option(
        AUTO, "steps in which the prototypes are frozen", minimum=0, published=2
    )


def check(config):
    """Accepts all combinations."""


class Toy(Method):
    """Prototypes, a bank, class means and labels."""

    needs_index = True
    needs_label = True

    def __init__(self, *args):
        super().__init__(*args)
        size = self.options.projection_size
        classes = self.run.num_classes

        def rows(count, seed):
            return unit(tf.random.stateless_normal([count, size], [seed, 0]))

        self.prototypes = tf.Variable(rows(classes, 1), name="prototypes")
        self.bank = tf.Variable(
            rows(self.run.num_images, 2), trainable=False, name="bank"
        )
        self.means = tf.Variable(
            tf.zeros([classes, self.encoder.features]),
            trainable=False,
            name="means",
        )
        self.loss_variables = (self.prototypes,)

    @property
    def whole_batch(self):
        return self.options.as_a_whole

    @classmethod
    def views(cls, options):
        return [options.view(f"view_{i}", options.crop) for i in (0, 1)]

    @classmethod
    def resolve_auto(cls, config, run):
        return {"frozen_steps": min(2, run.total_steps - 1)}

    def targets(self, batch):
        return tf.gather(self.bank, batch["index"])

    def forward(self, batch):
        features = self.encoder(batch["view_1"], training=True)
        return {
            "projection": self.project(batch["view_0"]),
            "other": (features, tf.reduce_mean(features, axis=1)),
        }

    def loss(self, outputs, targets, batch):
        rows, (features, mean) = outputs["projection"], outputs["other"]
        own = own_rows(targets, batch["example_ids"])
        logits = all_pairs(rows, self.prototypes)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(
            batch["label"], logits
        )
        loss += 1.0 - tf.reduce_sum(rows * own, axis=1) + 0.01 * mean**2
        wanted = tf.gather(self.constant_means(), batch["label"])
        loss += 0.01 * tf.reduce_mean((features - wanted) ** 2, axis=1)
        return loss, {"contrast_accuracy": tf.ones_like(loss)}

    def constant_means(self):
        return tf.stop_gradient(tf.convert_to_tensor(self.means))

    def transform_gradients(self, gradients, step):
        free = tf.cast(step >= self.options.frozen_steps, tf.float32)
        return [
            gradient * free if variable is self.prototypes else gradient
            for variable, gradient in zip(self.learned, gradients)
        ]

    def collapse_projections(self, targets, outputs):
        return collectives.gather(outputs["projection"])

    def update(self, batch, targets, outputs):
        index = collectives.gather(tf.cast(batch["index"], tf.int32))
        rows = collectives.gather(outputs["projection"])
        self.bank.scatter_update(tf.IndexedSlices(rows, index))

    def on_epoch_begin(self, epoch, features):
        found = features()
        assert features() is found  # computed once
        assert found.shape == (self.run.num_images, self.encoder.features)
        labels = tf.constant(LABELS[: len(found)])
        sums = tf.math.unsorted_segment_mean(
            found, labels, self.run.num_classes
        )
        self.means.assign(sums)
        EPOCHS.append(epoch)


METHOD = Toy
# Set by the tests: the label of each image, and the epochs that were begun.
LABELS = [i // 30 for i in range(60)]
EPOCHS = []


def register():
    """Registers `--method=toy`."""
    methods.register("toy", "tests.toy")
