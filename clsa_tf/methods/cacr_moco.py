"""CACR on MoCo v2: attraction to keys, repulsion from a queue and the batch.

Both encoders encode every view. A query is attracted to the keys of its image's
other views. It is repelled from the queue of older keys and from the queries of
the same view of all other images of the global batch.

Source: Zheng et al. (arXiv 2105.03746); JegZheng/CACR-SSL@fbc9d94,
large_scale_shift_experiments/. Two differences from the published code: it uses
the first view's distances to the queue for all views, so the other views learn
nothing from the queue; here each view uses its own distances. And its repelling
queries are those of the same replica; here they are those of all replicas, so
the result does not depend on the number of devices.
"""

import dataclasses

from clsa_tf import losses
from clsa_tf.distributed import collectives
from clsa_tf.methods import cacr, moco
from clsa_tf.methods.base import contrast_top1, own_rows
from clsa_tf.methods.momentum import MomentumMethod, check_queue
from clsa_tf.options import groups
from clsa_tf.options.fields import AUTO, option, override


@dataclasses.dataclass(frozen=True)
class Options(groups.Momentum, cacr.Options):
    """Flags of CACR on MoCo v2."""

    queue_size: int = override(moco.Options, "queue_size", AUTO)
    inbatch_negatives: bool = option(
        True,
        "repel each query from the other images' queries of the same view, "
        "too, not only from the queue",
    )
    repulsion_sharpness: float = override(
        cacr.Options, "repulsion_sharpness", 2.0
    )
    jitter: tuple[float, ...] = override(
        groups.AugmentationOptions, "jitter", (0.4, 0.4, 0.4, 0.1)
    )
    jitter_probability: float = override(
        groups.AugmentationOptions, "jitter_probability", 0.8
    )
    blur: float = override(groups.AugmentationOptions, "blur", 0.5)
    projection_layers: int = override(groups.Projection, "projection_layers", 2)


def check(config):
    """Raises `UserError` for options that conflict."""
    cacr.check(config)
    check_queue(config)


class CACRMoCo(MomentumMethod, cacr.CACR):
    """Attraction to a momentum encoder's keys, repulsion from its queue.

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
        """Views with the same role; both encoders encode each of them."""
        return [
            dataclasses.replace(view, shuffle=True, both_orders=True)
            for view in super().views(options)
        ]

    @property
    def whole_batch(self):
        """See `Method`."""
        return self.options.inbatch_negatives

    def targets(self, batch):
        """Keys float32 `[G, D]` of the global batch, by view."""
        return self.shuffled_keys(batch, self.view_names("view_"))

    def loss(self, outputs, targets, batch):
        """Attraction and repulsion of each query; see `Method.loss`."""
        ids = batch["example_ids"]
        options = self.options
        own = {name: own_rows(keys, ids) for name, keys in targets.items()}
        attractions = [
            losses.cacr_attraction(
                query,
                [own[x] for x in own if x != name],
                sharpness=options.attraction_sharpness,
                constant_weights=True,
            )
            for name, query in outputs.items()
        ]
        repulsions = [
            losses.cacr_repulsion(
                query,
                self._others(query),
                ids,
                sharpness=options.repulsion_sharpness,
                queue=self.queue.keys,
            )
            for query in outputs.values()
        ]
        loss, reports = options.contrast(attractions, repulsions)
        hits = contrast_top1(outputs["view_0"], targets["view_1"], ids)
        return loss, reports | {"contrast_accuracy": hits}

    def _others(self, queries):
        """Repelling queries, `[G, D]` with gradient; `[0, D]` if disabled."""
        if self.options.inbatch_negatives:
            return collectives.gather(queries)
        return queries[:0]

    def collapse_projections(self, targets, outputs):
        """Keys of the first view, of the global batch."""
        return targets["view_0"]

    def update(self, batch, targets, outputs):
        """Moves the momentum encoder, then stores the last view's keys."""
        super().update(batch, targets, outputs)
        self.queue.enqueue(targets[self.view_names("view_")[-1]])


METHOD = CACRMoCo
