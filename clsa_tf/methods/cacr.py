"""CACR: contrastive attraction and contrastive repulsion within the batch.

Several views of each image, all of equal standing. The more distant of them
attract one another more, and near views of other images repel more; no queue,
no momentum encoder, and the gradient flows into both sides.

Source: Zheng et al. (arXiv 2105.03746); JegZheng/CACR-SSL@fbc9d94,
small_scale_experiments/. Published for CIFAR-10 (crops 5x32:0.2:1), CIFAR-100
(the same, t- = 2) and STL-10 (5x64:0.08:1, t- = 2); the default crops are for
the default backbone. There the projection is the last, linear layer of a small
AlexNet: here one linear layer as well.
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
        "t+: the larger, the more the distant views of an image attract more "
        "than near ones; 0: all alike",
        minimum=0.0,
    )
    repulsion_sharpness: float = option(
        0.9,
        "t-: the larger, the more near images repel more than distant ones; "
        "0: all alike",
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
        """Loss of lists of `[n]`, one per view or pair; and its two parts."""
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
    unit = "squared distance"
    chance_text = (
        "the contrast of an encoder that tells nothing apart is {:.2f}; the "
        "further below, the better"
    )

    @classmethod
    def views(cls, options):
        """Views of equal standing."""
        return [
            options.view(f"view_{i}", crop)
            for i, crop in enumerate(options.crops)
        ]

    @classmethod
    def chance_loss(cls, config):
        """0: embeddings that are all the same neither attract nor repel.

        With equal weights unrelated ones, too, are about there.
        """
        return 0.0

    def forward(self, batch):
        """Unit projections of all views; see `Method.forward`."""
        return self.encode_views(self.project, batch, self.view_names())

    def loss(self, outputs, targets, batch):
        """Attraction of each view, repulsion of each pair; see `Method`.

        Of a pair the first is repelled from the second's other images, not the
        other way round, as published.
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
