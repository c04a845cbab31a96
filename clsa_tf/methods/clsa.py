"""CLSA: contrastive learning with stronger augmentations.

Weak queries have MoCo's contrastive loss. Its candidates are the keys of the
whole batch and of the queue. A divergence (DDM) is added: each weak query's
distribution over the candidates supervises that of each strong query. Strong
queries have no contrastive loss.

Source: Wang and Qi (arXiv 2104.07713); maple-research-lab/CLSA@37df76c.
"""

import dataclasses

from clsa_tf.errors import UserError
from clsa_tf.methods import moco
from clsa_tf.methods.base import own_rows
from clsa_tf.options import groups
from clsa_tf.options.fields import option, override


@dataclasses.dataclass(frozen=True)
class Options(groups.Divergence, moco.Options):
    """Flags of CLSA, in addition to those of MoCo and of the divergence."""

    ddm_weight: float = override(groups.Divergence, "ddm_weight", 1.0)
    inbatch_negatives: bool = override(moco.Options, "inbatch_negatives", True)
    strong_contrast: bool = option(
        False,
        "give strong queries a contrastive loss, too, like weak ones. With "
        "--ddm_weight=0 this is the naive use of strong views that the paper "
        "argues against",
    )

    @property
    def uses_strong_views(self):
        """Whether any loss uses strong views."""
        return self.ddm_weight > 0 or self.strong_contrast

    @property
    def contrasts(self):
        """Number of queries with a contrastive loss."""
        strong = self.strong_crops if self.strong_contrast else ()
        return len(self.query_crops) + len(strong)

    @property
    def momentum_teacher(self):
        """Whether the momentum encoder encodes the weak queries, too."""
        return self.ddm_weight > 0 and self.ddm_teacher == "momentum"


def check(config):
    """Raises `UserError` for options that conflict."""
    moco.check(config)
    config.options.check_divergence(momentum=True)
    if config.options.strong_contrast and not config.options.strong_crops:
        raise UserError(
            "Expected strong views for --strong_contrast, received no "
            "--strong_crops; set --strong_crops or omit --strong_contrast."
        )


class CLSA(moco.MoCo):
    """MoCo plus a divergence that supervises strongly augmented views."""

    @classmethod
    def views(cls, options):
        """The key and weak queries of MoCo, then the strong queries."""
        return super().views(options) + options.strong_views()

    def loss(self, outputs, targets, batch):
        """Contrast plus `ddm_weight` times divergence; see `Method.loss`.

        Both are sums over crops, as published, unless `--over_crops=mean`. Five
        weak and five strong crops have 5 contrasts and 25 divergences.
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
            own = [own_rows(targets[x], ids) for x in self.view_names("query_")]
            teachers = [self.similarities(x, targets["key"], ids) for x in own]
        ddm, on_ddm = self.divergence(teachers, strong)
        return contrast + ddm, reports | {"contrast": contrast} | on_ddm


METHOD = CLSA
