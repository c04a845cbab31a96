"""MoCo v1 and v2: each query against its own key and a queue of older keys.

Source: He et al. (arXiv 1911.05722), Chen et al. (arXiv 2003.04297);
facebookresearch/moco@7397dfe. The versions differ in their options only.
"""

import dataclasses
import math

import tensorflow as tf

from clsa_tf import losses
from clsa_tf.errors import UserError
from clsa_tf.methods.momentum import MomentumMethod, check_queue
from clsa_tf.options import groups
from clsa_tf.options.fields import AUTO, Crop, but, option


@dataclasses.dataclass(frozen=True)
class Options(groups.Momentum, groups.Projection, groups.Weak):
    """Flags of MoCo."""

    key_crop: Crop = option(
        Crop(224, 0.2, 1.0),
        "crop that keys are made of, size:min_area:max_area (px, shares)",
        group="views",
    )
    query_crops: tuple[Crop, ...] = option(
        (Crop(224, 0.2, 1.0),),
        "crops of the weakly augmented queries",
        group="views",
    )
    temperature: float = option(0.2, "T of the contrast", above=0.0)
    queue_size: int = option(
        AUTO,
        "K, keys in the queue; auto: 65,536 (looc: 16,384), but at most a "
        "quarter of the images, and at least the keys of one step",
        minimum=1,
        published=65_536,
    )
    inbatch_negatives: bool = option(
        False,
        "the other images' keys of the same batch are candidates, too, as in "
        "CLSA, not only the queue",
    )
    symmetric: bool = option(
        False,
        "key and (first) query change roles for a second loss, the two are "
        "averaged, and both views' keys are stored",
    )
    over_crops: str = but(groups.Weak, "over_crops", "sum")


def check(config):
    """Raises `UserError` for options that do not go together."""
    options = config.options
    if not options.query_crops:
        raise UserError(
            "Expected at least one crop in --query_crops, received none; give "
            "one, such as 224:0.2:1."
        )
    check_queue(config)


class MoCo(MomentumMethod):
    """Each query against its own key and a queue of older keys.

    Attributes:
        queue: the `KeyQueue`.
    """

    batch_statistics = "parts"

    def __init__(self, config, **kwargs):
        """See `Method`."""
        super().__init__(config, **kwargs)
        self.queue = self.make_queue()

    @classmethod
    def views(cls, options):
        """The key, whose rows are shuffled, and the queries."""
        # One that is a query as well is needed in both orders: see `shuffle`.
        key = options.view(
            "key", options.key_crop, shuffle=not options.symmetric
        )
        return [key] + [
            options.view(f"query_{i}", crop)
            for i, crop in enumerate(options.query_crops)
        ]

    @classmethod
    def useless(cls, config):
        """`ln(1 + K)`, or `ln(G + K)`, for each query if they are summed."""
        options = config.options
        own = config.batch_size if options.inbatch_negatives else 1
        terms = len(cls.contrasted(options))
        return (terms if options.over_crops == "sum" else 1) * math.log(
            own + options.queue_size
        )

    @classmethod
    def contrasted(cls, options):
        """Names of the views with a contrast of their own, of one direction."""
        return [f"query_{i}" for i in range(len(options.query_crops))]

    def directions(self):
        """Pairs of a view's name, whose keys are compared with, and queries."""
        queries = self.contrasted(self.options)
        if not self.options.symmetric:
            return [("key", queries)]
        return [("key", queries), ("query_0", ["key", *queries[1:]])]

    def targets(self, batch):
        """Keys float32 `[G, D]` of the global batch, by view."""
        return self.shuffled_keys(batch, self.encoded_by_keys())

    def encoded_by_keys(self):
        """Names of the views that the key encoder sees."""
        return [name for name, _ in self.directions()]

    def embed(self, batch):
        """Unit projections of all queries; see `Method.embed`."""
        names = [name for _, queries in self.directions() for name in queries]
        return self.project_all(
            lambda x: self.encoder.project(x, training=True),
            batch,
            list(dict.fromkeys(names)),
        )

    def compare(self, embedded, targets, rows):
        """Contrast of each query; see `Method.compare`."""
        found = [
            self.compare_with(name, queries, embedded, targets, rows)
            for name, queries in self.directions()
        ]
        return tf.nest.map_structure(lambda *x: sum(x) / len(x), *found)

    def compare_with(self, name, queries, embedded, targets, rows):
        """Loss and reports with the keys of view `name`."""
        similarities = [
            self.similarities(embedded[query], targets[name], rows)
            for query in queries
        ]
        return self.contrast(similarities, rows)

    def similarities(self, queries, keys, rows):
        """Cosines `[n, C]` of queries with their candidates.

        `C = 1 + K`, a row's own key first; or `G + K`, the keys of the batch
        in its order, then the queue.
        """
        old = losses.cosines(queries, self.queue.keys)
        if self.options.inbatch_negatives:
            new = losses.cosines(queries, keys)
        else:
            own = tf.gather(keys, rows)
            new = tf.einsum("nd,nd->n", queries, own)[:, tf.newaxis]
        return tf.concat([new, old], axis=1)

    def contrast(self, similarities, rows):
        """The queries' losses `[n]`, and reports on the first query."""
        options = self.options
        positive = rows if options.inbatch_negatives else tf.zeros_like(rows)
        terms = [
            losses.info_nce(x, positive, temperature=options.temperature)
            for x in similarities
        ]
        hits = tf.argmax(similarities[0], 1, tf.int32) == positive
        return options.reduce(terms), {
            "contrast_accuracy": tf.cast(hits, tf.float32)
        }

    def embeddings(self, targets, embedded):
        """Keys of the global batch."""
        return targets["key"]

    def update(self, targets):
        """Moves the key encoder, then stores the new keys."""
        super().update(targets)
        new = [targets[name] for name, _ in self.directions()]
        self.queue.enqueue(tf.concat(new, axis=0))


METHOD = MoCo
