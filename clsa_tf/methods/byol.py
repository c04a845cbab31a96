"""BYOL: prediction of a momentum encoder's projection of another view.

There are no negatives. A predictor on top of the trained encoder and a momentum
encoder, which follows slowly, prevent a collapse. `--ddm_weight` adds strong
views, supervised by the divergence (DDM) over the targets of the batch and,
with `--queue_size`, older targets.

Source: Grill et al. (arXiv 2006.07733); google-deepmind/deepmind-research,
byol/. That code starts the momentum encoder from other random weights; here, as
in the paper, it starts as a copy. The divergence on BYOL follows its authors in
issues 3 and 5 of maple-research-lab/CLSA.
"""

import dataclasses

import tensorflow as tf

from clsa_tf import losses
from clsa_tf.errors import UserError
from clsa_tf.methods.base import contrast_top1, own_rows
from clsa_tf.methods.momentum import PredictorMethod, check_queue
from clsa_tf.options import groups
from clsa_tf.options.fields import Crop, option


@dataclasses.dataclass(frozen=True)
class Options(groups.Divergence, groups.Prediction):
    """Flags of BYOL."""

    head_kind = "byol"

    local_crops: tuple[Crop, ...] = option(
        (),
        "additional, smaller crops that predict the targets of the two views "
        "(multi-crop of SwAV)",
        group="views",
    )
    queue_size: int = option(
        0,
        "number of older targets to add to the candidates of the divergence; "
        "advisable for small batches. 0: targets of the batch only",
        minimum=0,
    )


def check(config):
    """Raises `UserError` for options that conflict."""
    options = config.options
    options.check_asymmetric()
    options.check_divergence(momentum=True)
    if not options.queue_size:
        return
    if not options.ddm_weight:
        raise UserError(
            f"Expected --ddm_weight with --queue_size={options.queue_size}, "
            "received --ddm_weight=0: only the divergence uses the queue; set "
            "--ddm_weight or --queue_size=0."
        )
    check_queue(config)


class BYOL(PredictorMethod):
    """Prediction of a momentum encoder's projection of another view.

    Attributes:
        queue: the `KeyQueue` of older targets, or None.
    """

    loss_unit = "squared distance"
    chance_text = (
        "chance-level loss: {:.2f}, from unrelated predictions; 0 is a perfect "
        "prediction or, if `spread` is near 0, a collapse"
    )

    def __init__(self, *args):
        """See `Method`."""
        super().__init__(*args)
        self.queue = self.make_queue() if self.options.queue_size else None

    @classmethod
    def views(cls, options):
        """Two asymmetric views, then local and strong views."""
        return (
            options.two_views()
            + [
                options.view(f"view_{i}", crop)
                for i, crop in enumerate(options.local_crops, start=2)
            ]
            + options.strong_views()
        )

    @classmethod
    def chance_loss(cls, config):
        """4: the squared distance of unrelated unit vectors, both ways.

        Times one plus the number of local crops if their losses are summed.
        """
        terms = 1 + len(config.options.local_crops)
        return 4.0 * (terms if config.options.over_crops == "sum" else 1)

    def targets(self, batch):
        """Unit projections float32 `[G, D]` of both views."""
        return self.keys(batch, ("view_0", "view_1"))

    def forward(self, batch):
        """Unit predictions from all views; see `Method.forward`."""
        return self.encode_views(self.predictions, batch, self.view_names())

    def loss(self, outputs, targets, batch):
        """Sum of both directions, plus divergence; see `Method.loss`."""
        ids = batch["example_ids"]
        options = self.options
        own = {name: own_rows(x, ids) for name, x in targets.items()}
        total = 0.0
        for name in own:
            predicting = [x for x in self.view_names("view_") if x != name]
            total += options.reduce(
                [losses.regression(outputs[x], own[name]) for x in predicting]
            )
        hits = contrast_top1(outputs["view_0"], targets["view_1"], ids)
        reports = {"contrast_accuracy": hits}
        if not options.ddm_weight:
            return total, reports
        candidates = targets["view_1"]
        if self.queue:
            candidates = tf.concat([candidates, self.queue.keys], axis=0)
        online = options.ddm_teacher == "online"
        teacher = outputs["view_0"] if online else own["view_0"]
        ddm, on_ddm = self.divergence(
            [losses.cosines(teacher, candidates)],
            [
                losses.cosines(outputs[name], candidates)
                for name in self.view_names("strong_")
            ],
        )
        return total + ddm, reports | {"contrast": total} | on_ddm

    def collapse_projections(self, targets, outputs):
        """Targets of the first view."""
        return targets["view_0"]

    def update(self, batch, targets, outputs):
        """Moves the momentum encoder; with a queue, stores the targets."""
        super().update(batch, targets, outputs)
        if self.queue:
            self.queue.enqueue(targets["view_1"])


METHOD = BYOL
