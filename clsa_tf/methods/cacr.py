"""CACR: contrastive attraction and contrastive repulsion within the batch.

Each image has several views with the same role. Distant views of an image
attract each other more, and near views of other images repel more. There is no
queue and no momentum encoder, and the gradient flows into both sides.

Source: Zheng et al. (arXiv 2105.03746); JegZheng/CACR-SSL@fbc9d94,
small_scale_experiments/. Published for CIFAR-10 (crops 5x32:0.2:1), CIFAR-100
(the same, t- = 2) and STL-10 (5x64:0.08:1, t- = 2). The default crops suit the
default backbone. The published projection is the last, linear layer of a small
AlexNet; here, too, it is one linear layer.
"""

import dataclasses
import itertools

from clsa_tf import losses
from clsa_tf.distributed import collectives
from clsa_tf.errors import UserError
from clsa_tf.methods.base import Method, contrast_top1
from clsa_tf.options import groups
from clsa_tf.options.fields import Crop, option, override


@dataclasses.dataclass(frozen=True)
class Options(groups.Projection, groups.AugmentationOptions):
    """Flags of CACR."""

    crops: tuple[Crop, ...] = option(
        (Crop(224, 0.2, 1.0),) * 5,
        "crops of the views, at least two, size:min_area:max_area (px, shares)",
        group="views",
    )
    attraction_weight: float = option(
        1.0, "alpha, weight of the attraction", above=0.0
    )
    repulsion_weight: float = option(
        1.0, "beta, weight of the repulsion", above=0.0
    )
    attraction_sharpness: float = option(
        1.0,
        "t+: larger values give distant views of an image more weight in the "
        "attraction; 0: equal weights",
        minimum=0.0,
    )
    repulsion_sharpness: float = option(
        0.9,
        "t-: larger values give near images more weight in the repulsion; 0: "
        "equal weights",
        minimum=0.0,
    )
    jitter: tuple[float, ...] = override(
        groups.AugmentationOptions, "jitter", (0.4, 0.4, 0.4, 0.4)
    )
    jitter_probability: float = override(
        groups.AugmentationOptions, "jitter_probability", 1.0
    )
    blur: float = override(groups.AugmentationOptions, "blur", 0.0)
    projection_layers: int = override(groups.Projection, "projection_layers", 1)

    def contrast(self, attractions, repulsions):
        """Loss `[n]` and its reports, from lists of `[n]` per view or pair."""
        attraction = self.attraction_weight * self.reduce(attractions)
        repulsion = self.repulsion_weight * self.reduce(repulsions)
        contrast = attraction + repulsion
        return contrast, {
            "contrast": contrast,
            "attraction": attraction,
            "repulsion": repulsion,
        }


def check(config):
    """Raises `UserError` for options that do not go together."""
    if len(config.options.crops) < 2:
        raise UserError(
            "Expected at least two crops in --crops, which attract each other, "
            f"received {len(config.options.crops)}; give more, such as "
            "5x224:0.2:1."
        )


class CACR(Method):
    """Attraction of an image's views, repulsion of different images."""

    whole_batch = True
    loss_unit = "squared distance"
    chance_text = (
        "chance-level loss: {:.2f}; lower values (negative ones) are better"
    )

    @classmethod
    def views(cls, options):
        """Views with the same role and augmentation."""
        return [
            options.view(f"view_{i}", crop)
            for i, crop in enumerate(options.crops)
        ]

    @classmethod
    def chance_loss(cls, config):
        """0: identical projections neither attract nor repel.

        With equal weights, unrelated projections are near 0, too.
        """
        return 0.0

    def forward(self, batch):
        """Unit projections of all views; see `Method.forward`."""
        return self.encode_views(self.project, batch, self.view_names())

    def loss(self, outputs, targets, batch):
        """Attraction per view, repulsion per pair; see `Method.loss`.

        Of each pair of views, the first is repelled from other images' second
        views but not the reverse, as published.
        """
        ids = batch["example_ids"]
        options = self.options
        everywhere = {x: collectives.gather(z) for x, z in outputs.items()}
        attractions = [
            losses.cacr_attraction(
                outputs[name],
                [outputs[x] for x in outputs if x != name],
                sharpness=options.attraction_sharpness,
            )
            for name in outputs
        ]
        repulsions = [
            losses.cacr_repulsion(
                outputs[x],
                everywhere[y],
                ids,
                sharpness=options.repulsion_sharpness,
            )
            for x, y in itertools.combinations(outputs, 2)
        ]
        loss, reports = options.contrast(attractions, repulsions)
        hits = contrast_top1(outputs["view_0"], everywhere["view_1"], ids)
        return loss, reports | {"contrast_accuracy": hits}


METHOD = CACR
