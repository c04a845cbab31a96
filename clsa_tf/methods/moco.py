"""MoCo v1 and v2: each query against its own key and a queue of older keys.

Source: He et al. (arXiv 1911.05722), Chen et al. (arXiv 2003.04297);
facebookresearch/moco@7397dfe. The versions differ only in their options.
"""

import dataclasses
import math

import tensorflow as tf

from clsa_tf import losses
from clsa_tf.errors import UserError
from clsa_tf.losses.contrast import top1
from clsa_tf.losses.products import row_by_row
from clsa_tf.methods.base import own_rows
from clsa_tf.methods.momentum import MomentumMethod, check_queue
from clsa_tf.methods.symmetric import symmetric
from clsa_tf.options import groups
from clsa_tf.options.fields import AUTO, Crop, option, override


@dataclasses.dataclass(frozen=True)
class Options(groups.Momentum, groups.Projection, groups.AugmentationOptions):
    """Flags of MoCo."""

    key_crop: Crop = option(
        Crop(224, 0.2, 1.0),
        "crop of the keys, size:min_area:max_area (px, shares)",
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
        "number K of keys in the queue. auto: 65,536 (looc: 16,384), but at "
        "most a quarter of the images and at least the keys of one step",
        minimum=1,
        published=65_536,
    )
    inbatch_negatives: bool = option(
        False,
        "use the other images' keys of the same batch as negatives, too, as in "
        "CLSA, not only the queue",
    )
    symmetric: bool = option(
        False,
        "average the loss over both roles of the key view and the first query "
        "view, and store the keys of both",
    )
    over_crops: str = override(groups.AugmentationOptions, "over_crops", "sum")

    # Whether the momentum encoder encodes the queries, too (CLSA).
    momentum_teacher = False

    @property
    def contrasts(self):
        """Number of queries with a contrastive loss."""
        return len(self.query_crops)


def check(config):
    """Raises `UserError` for options that conflict."""
    options = config.options
    if not options.query_crops:
        raise UserError(
            "Expected at least one crop in --query_crops, received none; set "
            "one, such as --query_crops=224:0.2:1."
        )
    check_queue(config)


class MoCo(MomentumMethod):
    """Each query against its own key and a queue of older keys.

    Attributes:
        queue: the `KeyQueue`.
    """

    batch_statistics = "parts"

    def __init__(self, *args):
        """See `Method`."""
        super().__init__(*args)
        self.queue = self.make_queue()

    @classmethod
    def views(cls, options):
        """The key, in shuffled order (ShuffleBN), and the queries."""
        # Both encoders use these queries: plain and shuffled.
        both = options.momentum_teacher
        key = options.view("key", options.key_crop, shuffle=True)
        return [key] + [
            options.view(f"query_{i}", crop, shuffle=both, both_orders=both)
            for i, crop in enumerate(options.query_crops)
        ]

    @classmethod
    def variant(cls, options):
        """With `--symmetric` the symmetric class; see `Method.variant`."""
        return symmetric(cls) if options.symmetric else cls

    @classmethod
    def chance_loss(cls, config):
        """`ln(1 + K)`, or `ln(G + K)` with in-batch negatives.

        Times the number of queries if their losses are summed.
        """
        options = config.options
        own = config.batch_size if options.inbatch_negatives else 1
        terms = options.contrasts if options.over_crops == "sum" else 1
        return terms * math.log(own + options.queue_size)

    def targets(self, batch):
        """Keys float32 `[G, D]` of the global batch, by view."""
        views = self.views(self.options)
        return self.shuffled_keys(batch, [v.name for v in views if v.shuffle])

    def forward(self, batch):
        """Unit projections `[n, D]` of the queries; see `Method.forward`."""
        return self.encode_views(self.project, batch, self.query_names())

    def query_names(self):
        """Names of the views that `forward` encodes."""
        return [name for name in self.view_names() if name != "key"]

    def loss(self, outputs, targets, batch):
        """Contrast of each query with the view `key`; see `Method.loss`."""
        ids = batch["example_ids"]
        return self.contrast(
            [
                self.similarities(outputs[name], targets["key"], ids)
                for name in self.view_names("query_")
            ],
            ids,
        )

    def similarities(self, queries, keys, example_ids):
        """Cosines `[n, C]` of queries with their candidates.

        `C = 1 + K`: the example's own key, then the queue. With in-batch
        negatives `C = G + K`: the keys of the global batch in its order, then
        the queue.
        """
        old = losses.cosines(queries, self.queue.keys)
        if self.options.inbatch_negatives:
            new = losses.cosines(queries, keys)
        else:
            own = own_rows(keys, example_ids)
            new = row_by_row(queries, own)[:, tf.newaxis]
        return tf.concat([new, old], axis=1)

    def contrast(self, similarities, example_ids):
        """InfoNCE `[n]` over all queries; reports top-1 of the first query."""
        options = self.options
        positive = tf.zeros_like(example_ids)
        if options.inbatch_negatives:
            positive = example_ids
        terms = [
            losses.info_nce(x, positive, temperature=options.temperature)
            for x in similarities
        ]
        hits = top1(similarities[0], positive)
        return options.reduce(terms), {"contrast_accuracy": hits}

    def collapse_projections(self, targets, outputs):
        """Keys of the global batch."""
        return targets["key"]

    def update(self, batch, targets, outputs):
        """Moves the momentum encoder, then stores the new keys."""
        super().update(batch, targets, outputs)
        self.queue.enqueue(targets["key"])


METHOD = MoCo
