"""CLSA: contrastive learning with stronger augmentations.

MoCo's contrast of weak queries, against the keys of the whole batch as well as
the queue, plus a divergence (DDM) through which each weak query's distribution
over those candidates teaches that of each strong query. Strong queries have no
contrast of their own.

Source: Wang and Qi (arXiv 2104.07713); maple-research-lab/CLSA@37df76c.
"""

import dataclasses

import tensorflow as tf

from clsa_tf.errors import UserError
from clsa_tf.methods import moco
from clsa_tf.options import groups
from clsa_tf.options.fields import but, option


@dataclasses.dataclass(frozen=True)
class Options(groups.Divergence, moco.Options):
    """Flags of CLSA: those of MoCo, of the divergence, and these."""

    ddm_weight: float = but(groups.Divergence, "ddm_weight", 1.0)
    inbatch_negatives: bool = but(moco.Options, "inbatch_negatives", True)
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
    """MoCo plus a divergence that teaches strongly augmented views."""

    @classmethod
    def views(cls, options):
        """MoCo's key and weak queries, and the strong queries."""
        return super().views(options) + options.strong_views()

    @classmethod
    def contrasted(cls, options):
        """The weak queries; and the strong ones, used naively."""
        strong = options.strong_crops if options.strong_contrast else ()
        return super().contrasted(options) + [
            f"strong_{i}" for i in range(len(strong))
        ]

    def encoded_by_keys(self):
        """Of a momentum teacher the weak queries, too."""
        names = super().encoded_by_keys()
        if self.options.ddm_weight and self.options.ddm_teacher == "momentum":
            names += self.names("query_")
        return list(dict.fromkeys(names))

    def embed(self, batch):
        """Unit projections of all queries, the strong ones at last."""
        names = [name for _, queries in self.directions() for name in queries]
        return self.project_all(
            lambda x: self.encoder.project(x, training=True),
            batch,
            list(dict.fromkeys(names + self.names("strong_"))),
        )

    def compare_with(self, name, queries, embedded, targets, rows):
        """Contrast plus `ddm_weight` times divergence; see `Method.compare`.

        Both are sums over crops, as published, unless `--over_crops=mean`:
        five crops have 5 contrasts and 25 divergences.
        """
        options = self.options
        online = {
            x: self.similarities(embedded[x], targets[name], rows)
            for x in [*queries, *self.names("strong_")]
        }
        contrast, reports = self.contrast([online[x] for x in queries], rows)
        if not options.ddm_weight:
            return contrast, reports
        weak = [x for x in queries if not x.startswith("strong_")]
        teachers = [online[x] for x in weak]
        if options.ddm_teacher == "momentum":
            teachers = [
                self.similarities(
                    tf.gather(targets[x], rows), targets[name], rows
                )
                for x in weak
            ]
        ddm, on_ddm = self.divergence(
            teachers, [online[x] for x in self.names("strong_")]
        )
        return contrast + ddm, reports | {"contrast": contrast} | on_ddm


METHOD = CLSA
