"""MoCo v2: each query against its own key and a queue of older keys.

Source: He et al. (arXiv 1911.05722), Chen et al. (arXiv 2003.04297);
facebookresearch/moco@7397dfe.
"""

import dataclasses
import math

import tensorflow as tf

from clsa_tf import distribute, losses
from clsa_tf.augment.views import View
from clsa_tf.errors import UserError
from clsa_tf.key_queue import KeyQueue
from clsa_tf.methods.base import Method
from clsa_tf.options import Crop, option


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of MoCo."""

    key_crop: Crop = option(
        Crop(224, 0.2, 1.0),
        "crop that keys are made of, size:min_area:max_area (px, shares)",
    )
    query_crops: tuple[Crop, ...] = option(
        (Crop(224, 0.2, 1.0),), "crops of the weakly augmented queries"
    )
    temperature: float = option(0.2, "T of the contrast", above=0.0)
    queue_size: int = option(65_536, "K, keys in the queue", minimum=1)
    key_momentum: float = option(
        0.999,
        "m of the key encoder's moving average, in [0, 1]",
        minimum=0.0,
        maximum=1.0,
    )
    projection_size: int = option(128, "D, width of the projection", minimum=2)
    blur: float = option(
        0.5,
        "probability, in [0, 1], of a view's Gaussian blur of 0.1 to 2 px; 0 "
        "for images of about 32 to 64 px",
        minimum=0.0,
        maximum=1.0,
    )

    def view(self, name, crop, **details):
        """Returns the `View` called `name` that shows `crop`."""
        return View(
            name,
            crop.size,
            crop.min_area,
            crop.max_area,
            blur=self.blur,
            **details,
        )


def check(config):
    """Raises `UserError` for options that do not go together."""
    if config.options.queue_size < config.batch_size:
        raise UserError(
            "Expected a queue at least as long as the global batch of "
            f"{config.batch_size}, received --queue_size="
            f"{config.options.queue_size}; lengthen it or lower --batch_size."
        )


class MoCo(Method):
    """Momentum contrast.

    Attributes:
        key_encoder: moving average of `encoder`; its batch normalisation runs
            with batch statistics, and nothing but `update` changes its weights.
        queue: the `KeyQueue`.
    """

    def __init__(self, config):
        """See `Method`."""
        super().__init__(config)
        self.key_encoder = self.make_encoder("key_encoder")
        for key, query in zip(
            self.key_encoder.variables, self.encoder.variables
        ):
            key.assign(query)
        self.queue = KeyQueue(
            config.options.queue_size,
            config.options.projection_size,
            seed=config.seed,
        )

    @classmethod
    def views(cls, options):
        """The key, whose rows are shuffled, and the queries."""
        key = options.view("key", options.key_crop, shuffle=True)
        return [key] + [
            options.view(f"query_{i}", crop)
            for i, crop in enumerate(options.query_crops)
        ]

    @classmethod
    def useless(cls, config):
        """`ln(1 + K)` for each query."""
        options = config.options
        return len(options.query_crops) * math.log(1 + options.queue_size)

    def targets(self, batch):
        """Keys float32 `[G, D]` of the global batch, in its order."""
        keys = distribute.gather(
            self.in_parts(
                lambda images: self.key_encoder.project(images, training=True),
                batch["key"],
            )
        )
        # The loader shuffled the rows, so that a key's batch statistics say
        # nothing about its query; back into their places.
        rows = distribute.gather(batch["key_rows"])
        return tf.scatter_nd(rows[:, tf.newaxis], keys, tf.shape(keys))

    def objective(self, batch, targets):
        """Contrast of each query; see `Method.objective`."""
        queries = self.project_all(batch, "query_")
        own_keys = tf.gather(targets, batch["rows"])
        zeros = tf.zeros_like(batch["rows"])
        similarities = [
            tf.concat(
                [
                    tf.einsum("nd,nd->n", query, own_keys)[:, tf.newaxis],
                    losses.cosines(query, self.queue.keys),
                ],
                axis=1,
            )
            for query in queries
        ]
        return self.contrast(similarities, zeros)

    def update(self, targets):
        """Moves the key encoder, then stores the new keys."""
        distribute.moving_average(
            self.key_encoder.trainable_variables,
            self.encoder.trainable_variables,
            self.config.options.key_momentum,
        )
        self.queue.enqueue(targets)

    def project_all(self, batch, prefix):
        """Unit projections `[N, D]` of each view whose name has `prefix`."""
        # One pass per crop, as published: each has its own batch statistics.
        return [
            self.encoder.project(batch[view.name], training=True)
            for view in self.views(self.config.options)
            if view.name.startswith(prefix)
        ]

    def contrast(self, similarities, positive):
        """Sum of the queries' losses `[N]`, and reports on the first query."""
        terms = [
            losses.info_nce(
                x, positive, temperature=self.config.options.temperature
            )
            for x in similarities
        ]
        hits = tf.argmax(similarities[0], 1, tf.int32) == positive
        return tf.add_n(terms), {"contrast_accuracy": tf.cast(hits, tf.float32)}


METHOD = MoCo
