"""CLSA: contrastive learning with stronger augmentations.

MoCo's contrast of weak queries, with the keys of the whole batch as well as the
queue as candidates, plus a divergence (DDM): each weak query's distribution
over the candidates supervises that of each strong query. Strong queries have no
contrast of their own.

Source: Wang and Qi (arXiv 2104.07713); maple-research-lab/CLSA@37df76c.
"""

import dataclasses

import tensorflow as tf

from clsa_tf.errors import UserError
from clsa_tf.methods import moco
from clsa_tf.options import groups
from clsa_tf.options.fields import option, override


@dataclasses.dataclass(frozen=True)
class Options(groups.Divergence, moco.Options):
    """Flags of CLSA: those of MoCo, of the divergence, and these."""

    ddm_weight: float = override(groups.Divergence, "ddm_weight", 1.0)
    inbatch_negatives: bool = override(moco.Options, "inbatch_negatives", True)
    strong_contrast: bool = option(
        False,
        "strong queries have a contrast of their own, like weak ones: with "
        "--ddm_weight=0 the naive use of strong views that the paper argues "
        "against",
    )

    @property
    def uses_strong_views(self):
        """Whether strong views take part in any loss."""
        return self.ddm_weight > 0 or self.strong_contrast

    @property
    def contrasts(self):
        """Number of queries with a contrast of their own."""
        strong = self.strong_crops if self.strong_contrast else ()
        return len(self.query_crops) + len(strong)

    @property
    def momentum_teacher(self):
        """Whether the momentum encoder sees the weak queries, too."""
        return self.ddm_weight > 0 and self.ddm_teacher == "momentum"


def check(config):
    """Raises `UserError` for options that do not go together."""
    moco.check(config)
    config.options.check_divergence(momentum=True)
    if config.options.strong_contrast and not config.options.strong_crops:
        raise UserError(
            "Expected strong views for --strong_contrast, received no "
            "--strong_crops; give them or leave it out."
        )


class CLSA(moco.MoCo):
    """MoCo plus a divergence that supervises strongly augmented views."""

    @classmethod
    def views(cls, options):
        """MoCo's key and weak queries, and the strong queries."""
        return super().views(options) + options.strong_views()

    def one_way_loss(self, outputs, targets, batch):
        """Contrast plus `ddm_weight` times divergence; see `Method.loss`.

        Both are sums over crops, as published, unless `--over_crops=mean`:
        five crops have 5 contrasts and 25 divergences.
        """
        options, ids = self.options, batch["example_ids"]
        # Cosines [n, C] of each query with the candidates: the keys of the
        # batch, then the queue.
        weak, strong = (
            [self.similarities(outputs[x], targets["key"], ids) for x in names]
            for names in (self.view_names("query_"), self.view_names("strong_"))
        )
        contrasted = weak + strong if options.strong_contrast else weak
        contrast, reports = self.contrast(contrasted, ids)
        if not options.ddm_weight:
            return contrast, reports

        teachers = weak
        if options.momentum_teacher:
            own = [
                tf.gather(targets[x], ids) for x in self.view_names("query_")
            ]
            teachers = [self.similarities(x, targets["key"], ids) for x in own]
        ddm, on_ddm = self.divergence(teachers, strong)
        return contrast + ddm, reports | {"contrast": contrast} | on_ddm


METHOD = CLSA
