"""SimCLR v1 and v2: two views of each image against all others of the batch.

There is no momentum encoder and no queue. The negatives are the views of the
other images of the global batch, and the gradient flows into both sides.
`--ddm_weight` adds strong views, supervised by the divergence (DDM) over the
batch.

Source: Chen et al. (arXiv 2002.05709, 2006.10029); google-research/simclr,
tf2/. The versions differ only in their options (depth of the head).
"""

import dataclasses
import math

import tensorflow as tf

from clsa_tf import losses
from clsa_tf.distributed import collectives
from clsa_tf.methods.base import Method, contrast_top1
from clsa_tf.options import groups
from clsa_tf.options.fields import Crop, option, override


@dataclasses.dataclass(frozen=True)
class Options(groups.Divergence, groups.Projection, groups.AugmentationOptions):
    """Flags of SimCLR."""

    head_kind = "simclr"

    crop: Crop = option(
        Crop(224, 0.08, 1.0),
        "crop of the two views, size:min_area:max_area (px, shares)",
        group="views",
    )
    local_crops: tuple[Crop, ...] = option(
        (),
        "additional, smaller crops that are compared with the two views, but "
        "not with one another (multi-crop of SwAV)",
        group="views",
    )
    temperature: float = option(0.1, "T of the contrast", above=0.0)
    jitter: tuple[float, ...] = override(
        groups.AugmentationOptions, "jitter", (0.8, 0.8, 0.8, 0.2)
    )
    join_crops: bool = override(groups.AugmentationOptions, "join_crops", True)
    projection_layers: int = override(groups.Projection, "projection_layers", 3)


def check(config):
    """Raises `UserError` for options that conflict."""
    config.options.check_divergence(momentum=False)


class SimCLR(Method):
    """Two views of each image against all others of the batch."""

    whole_batch = True

    @classmethod
    def views(cls, options):
        """Two views with the same role, then local and strong views."""
        crops = [options.crop, options.crop, *options.local_crops]
        return [
            options.view(f"view_{i}", crop) for i, crop in enumerate(crops)
        ] + options.strong_views()

    @classmethod
    def chance_loss(cls, config):
        """`ln(2 G - 1)` for each of the two directions.

        Times one plus the number of local crops if their losses are summed.
        """
        terms = 1 + len(config.options.local_crops)
        terms = terms if config.options.over_crops == "sum" else 1
        return 2 * terms * math.log(2 * config.batch_size - 1)

    def forward(self, batch):
        """Unit projections of all views; see `Method.forward`."""
        return self.encode_views(self.project, batch, self.view_names())

    def loss(self, outputs, targets, batch):
        """NT-Xent in both directions, plus divergence; see `Method.loss`.

        The two directions are summed, as in the published code. That is twice
        the paper's value.
        """
        ids = batch["example_ids"]
        options = self.options
        both = [collectives.gather(outputs[f"view_{i}"]) for i in (0, 1)]
        total = 0.0
        for i in (0, 1):
            queries = [x for x in self.view_names("view_") if x != f"view_{i}"]
            total += options.reduce(
                [
                    losses.nt_xent(
                        outputs[query],
                        both[i],
                        both[1 - i],
                        ids,
                        temperature=options.temperature,
                    )
                    for query in queries
                ]
            )
        hits = contrast_top1(outputs["view_0"], both[1], ids)
        reports = {"contrast_accuracy": hits}
        if not options.ddm_weight:
            return total, reports
        # Constant, so that only the strong views learn from the divergence.
        candidates = tf.stop_gradient(both[1])
        ddm, on_ddm = self.divergence(
            [losses.cosines(outputs["view_0"], candidates)],
            [
                losses.cosines(outputs[name], candidates)
                for name in self.view_names("strong_")
            ],
        )
        return total + ddm, reports | {"contrast": total} | on_ddm


METHOD = SimCLR
