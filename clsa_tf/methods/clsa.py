"""CLSA: contrastive learning with stronger augmentations.

MoCo's contrast of weak queries, against the keys of the whole batch as well as
the queue, plus a divergence (DDM) through which each weak query's distribution
over those candidates teaches that of each strong query. Strong queries have no
contrast of their own.

Source: Wang and Qi (arXiv 2104.07713); maple-research-lab/CLSA@37df76c.
"""

import dataclasses
import math

import tensorflow as tf

from clsa_tf import losses
from clsa_tf.augment import strong
from clsa_tf.methods import moco
from clsa_tf.options import Crop, option


@dataclasses.dataclass(frozen=True)
class Options(moco.Options):
    """Flags of CLSA: those of MoCo and these."""

    strong_crops: tuple[Crop, ...] = option(
        (Crop(96, 0.086, 0.429),), "crops of the strongly augmented queries"
    )
    strong_ops: int = option(
        5,
        "strong operations drawn per strong view, each applied with "
        "probability 1/2",
        minimum=0,
    )
    strong_pool: str = option(
        "released",
        "what they are drawn from: the 14 operations and whole levels of the "
        "released code, or the paper's (Invert instead of Identity, continuous "
        "levels)",
        choices=tuple(strong.POOLS),
    )
    strong_level: int = option(
        strong.MAX_LEVEL,
        "bound, in 2..10, of the levels: 1 to one below it (released), 0 to it "
        "(paper)",
        minimum=2,
        maximum=strong.MAX_LEVEL,
    )
    ddm_weight: float = option(
        1.0, "weight of the divergence beside the contrast", minimum=0.0
    )
    ddm_temperature: float = option(
        0.2, "T of the divergence's distributions", above=0.0
    )


class CLSA(moco.MoCo):
    """MoCo plus distributional divergence."""

    @classmethod
    def views(cls, options):
        """MoCo's key and weak queries, and the strong queries."""
        return super().views(options) + [
            options.view(
                f"strong_{i}",
                crop,
                strong_ops=options.strong_ops,
                strong_pool=options.strong_pool,
                strong_level=options.strong_level,
            )
            for i, crop in enumerate(options.strong_crops)
        ]

    @classmethod
    def useless(cls, config):
        """`ln(G + K)` for each weak query."""
        candidates = config.batch_size + config.options.queue_size
        return len(config.options.query_crops) * math.log(candidates)

    def objective(self, batch, targets):
        """Contrast plus `ddm_weight` times divergence; see `Method.objective`.

        Both are sums over crops, not means, as published: five crops have 5
        contrasts and 25 divergences.
        """
        options = self.config.options
        queries = self.project_all(batch, "query_")
        students = self.project_all(batch, "strong_")
        # [G + K, D]; all keys of the global batch, each row's own among them.
        candidates = tf.concat([targets, self.queue.keys], axis=0)
        weak = [losses.cosines(x, candidates) for x in queries]
        strong = [losses.cosines(x, candidates) for x in students]
        contrast, reports = self.contrast(weak, batch["rows"])
        ddm = losses.ddm(weak, strong, temperature=options.ddm_temperature)
        floor = len(strong) * losses.teacher_entropy(
            weak, temperature=options.ddm_temperature
        )
        reports |= {"contrast": contrast, "ddm": ddm, "ddm_kl": ddm - floor}
        return contrast + options.ddm_weight * ddm, reports


check = moco.check
METHOD = CLSA
