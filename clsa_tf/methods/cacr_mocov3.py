"""CACR on MoCo v3: predictions against a momentum encoder's keys of the batch.

As in BYOL, there is a predictor on top of the trained encoder, and a momentum
encoder whose momentum rises to 1. There is no queue. Each key view is compared
with the predictions from all other views; distant ones weigh more. Predictions
are made from local crops ("light mode"); with `--local_keys` local crops are
keys, too ("full mode").

Source: Zheng et al. (arXiv 2105.03746); JegZheng/CACR-SSL@fbc9d94,
imagenet_pretraining/, after facebookresearch/moco-v3. One difference: the loss
with `--cost=euclidean` is a mean over images, too; the published code sums it
over a device's images.
"""

import dataclasses
import math

from clsa_tf import losses
from clsa_tf.errors import UserError
from clsa_tf.methods.base import contrast_top1
from clsa_tf.methods.momentum import PredictorMethod
from clsa_tf.networks.heads import Head
from clsa_tf.options import groups
from clsa_tf.options.fields import Crop, option, override

COSTS = {"rbf": losses.cacr_rbf, "euclidean": losses.cacr_euclidean}


@dataclasses.dataclass(frozen=True)
class Options(groups.Prediction):
    """Flags of CACR on MoCo v3."""

    head_kind = "mocov3"

    crop: Crop = override(groups.AsymmetricViews, "crop", Crop(224, 0.2, 1.0))
    local_crops: tuple[Crop, ...] = option(
        (),
        "additional, smaller crops that are compared with the keys of the two "
        "views; published 8x96:0.05:0.4",
        group="views",
    )
    local_keys: bool = option(
        False,
        "use --local_crops as keys, too, encoded by the momentum encoder",
    )
    cost: str = option(
        "rbf",
        "cost of a distance: a radial basis function (rbf), which gives MoCo "
        "v3's contrastive loss, or the squared distance itself (euclidean)",
        choices=tuple(COSTS),
    )
    temperature: float = option(
        1.0,
        "temperature T of the contrastive loss and of the views' weights",
        above=0.0,
    )


def check(config):
    """Raises `UserError` for options that conflict."""
    options = config.options
    options.check_asymmetric()
    if options.local_keys and not options.local_crops:
        raise UserError(
            "Expected local crops for --local_keys, received no --local_crops; "
            "set them, such as --local_crops=8x96:0.05:0.4, or omit "
            "--local_keys."
        )


class CACRMoCoV3(PredictorMethod):
    """Predictions against a momentum encoder's keys of the batch."""

    loss_unit = "contrast"
    chance_text = "chance-level loss: {:.2f}"

    @property
    def predictor_head(self):
        """The predictor of MoCo v3; its last layer is not normalised."""
        options = self.options
        return Head(
            "mocov3_predictor",
            hidden=options.projection_hidden,
            outputs=options.projection_size,
        )

    @classmethod
    def views(cls, options):
        """Two asymmetric views (blur, solarisation), then local views."""
        return options.two_views() + [
            options.view(f"view_{i}", crop)
            for i, crop in enumerate(options.local_crops, start=2)
        ]

    @classmethod
    def key_views(cls, options):
        """Names of the views that the momentum encoder encodes."""
        local = len(options.local_crops) if options.local_keys else 0
        return [f"view_{i}" for i in range(2 + local)]

    @classmethod
    def chance_loss(cls, config):
        """`2 T ln G`, for each key view if the terms are summed.

        0 with squared distances: those to own and other keys cancel.
        """
        options = config.options
        if options.cost == "euclidean":
            return 0.0
        keys = len(cls.key_views(options))
        terms = keys if options.over_crops == "sum" else 1
        return terms * 2 * options.temperature * math.log(config.batch_size)

    def targets(self, batch):
        """Keys float32 `[G, D]` of the global batch, by view."""
        return self.keys(batch, self.key_views(self.options))

    def forward(self, batch):
        """Unit predictions from all views; see `Method.forward`."""
        return self.encode_views(
            self.predictions, batch, self.view_names("view_")
        )

    def loss(self, outputs, targets, batch):
        """Mean over the key views; see `Method.loss`.

        With two views this is half of MoCo v3's loss; `--over_crops=sum` gives
        MoCo v3's.
        """
        ids = batch["example_ids"]
        options = self.options
        terms = [
            COSTS[options.cost](
                [query for x, query in outputs.items() if x != name],
                keys,
                ids,
                temperature=options.temperature,
            )
            for name, keys in targets.items()
        ]
        hits = contrast_top1(outputs["view_0"], targets["view_1"], ids)
        return options.reduce(terms), {"contrast_accuracy": hits}

    def collapse_projections(self, targets, outputs):
        """Keys of the first view, of the global batch."""
        return targets["view_0"]


METHOD = CACRMoCoV3
