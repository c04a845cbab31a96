"""Options shared by several methods, so that a flag has one meaning.

A method's `Options` inherits the groups it needs and overrides their defaults.
"""

import dataclasses

from clsa_tf.augment import strong
from clsa_tf.augment.views import View
from clsa_tf.errors import UserError
from clsa_tf.networks.heads import Head
from clsa_tf.options.fields import AUTO, Crop, option, override


@dataclasses.dataclass(frozen=True)
class AugmentationOptions:
    """The weak augmentation, and how crops are encoded and combined."""

    jitter: tuple[float, ...] = option(
        (0.4, 0.4, 0.4, 0.1),
        "strengths of the colour jitter of brightness, contrast, saturation "
        "(factors in 1 - strength .. 1 + strength) and hue (largest shift as a "
        "share of the colour circle)",
        group="views",
    )
    jitter_probability: float = option(
        0.8,
        "probability, in [0, 1], of the colour jitter",
        minimum=0.0,
        maximum=1.0,
        group="views",
    )
    gray: float = option(
        0.2,
        "probability, in [0, 1], of greyscale",
        minimum=0.0,
        maximum=1.0,
        group="views",
    )
    gray_first: bool = option(
        False,
        "apply greyscale before the jitter, as in MoCo v1, not after it",
        group="views",
    )
    blur: float = option(
        0.5,
        "probability, in [0, 1], of a Gaussian blur of 0.1 to 2 px. Use 0 for "
        "images of about 32 to 64 px",
        minimum=0.0,
        maximum=1.0,
        group="views",
    )
    join_crops: bool = option(
        False,
        "encode crops of equal size in one batch with shared batch statistics "
        "(SimCLR, SwAV), not one after the other",
        group="network",
    )
    over_crops: str = option(
        "mean",
        "how to combine the losses of several crops of an image",
        choices=("sum", "mean"),
    )

    def view(self, name, crop, **details):
        """Makes the `View` called `name` of `crop`; `details` override."""
        weak = dict(
            jitter=self.jitter,
            jitter_probability=self.jitter_probability,
            gray=self.gray,
            gray_first=self.gray_first,
            blur=self.blur,
        )
        return View(
            name, crop.size, crop.min_area, crop.max_area, **weak | details
        )

    def reduce(self, losses):
        """Sum or mean, according to `--over_crops`, of a list of `[N]`."""
        total = sum(losses[1:], start=losses[0])
        return total / len(losses) if self.over_crops == "mean" else total


@dataclasses.dataclass(frozen=True)
class AsymmetricViews:
    """Two views with the same crop settings, unequal blur and solarisation.

    Source: BYOL (arXiv 2006.07733), appendix B.
    """

    crop: Crop = option(
        Crop(224, 0.08, 1.0),
        "crop of both views",
        group="views",
    )
    view_blur: tuple[float, ...] = option(
        (1.0, 0.1),
        "probabilities, in [0, 1], of the blur of the two views",
        group="views",
    )
    view_solarize: tuple[float, ...] = option(
        (0.0, 0.2),
        "probabilities, in [0, 1], of the solarisation of the two views",
        group="views",
    )

    def two_views(self):
        """The `View`s `view_0` and `view_1`."""
        return [
            self.view(f"view_{i}", self.crop, blur=blur, solarize=solarize)
            for i, (blur, solarize) in enumerate(
                zip(self.view_blur, self.view_solarize)
            )
        ]

    def check_asymmetric(self):
        """Raises `UserError` unless both options are two probabilities."""
        for name in ("view_blur", "view_solarize"):
            value = getattr(self, name)
            if len(value) != 2 or not all(0 <= x <= 1 for x in value):
                raise UserError(
                    f"Expected two probabilities in [0, 1] for --{name}, "
                    f"received {','.join(map(str, value))}; pass two numbers "
                    "separated by a comma."
                )


@dataclasses.dataclass(frozen=True)
class Projection:
    """The projection head."""

    head_kind = "plain"

    projection_size: int = option(
        128,
        "width D of the projection",
        minimum=2,
        group="network",
    )
    projection_layers: int = option(
        2,
        "number of linear layers of the projection head",
        minimum=1,
        group="network",
    )
    projection_hidden: int = option(
        0,
        "width of the hidden layers of the projection head; 0: width of the "
        "features",
        minimum=0,
        group="network",
    )

    # Number of parallel heads; whether the concatenated hidden layers of the
    # heads replace the backbone's features in evaluation and export.
    heads = 1
    concatenate = False

    @property
    def head(self):
        """The encoder's projection `Head`."""
        return Head(
            self.head_kind,
            self.projection_layers,
            self.projection_hidden,
            self.projection_size,
        )


@dataclasses.dataclass(frozen=True)
class Momentum:
    """The momentum encoder."""

    key_momentum: float = option(
        AUTO,
        "momentum m, in [0, 1], of the momentum encoder; with a schedule, its "
        "initial value. auto: 0.999 (byol and cacr_mocov3: 0.996), or less for "
        "runs of fewer than 40 / (1 - m) steps",
        minimum=0.0,
        maximum=1.0,
        published=0.999,
    )
    key_momentum_schedule: str = option(
        "constant",
        "schedule of --key_momentum: constant, or a rise to 1 along half a "
        "cosine",
        choices=("constant", "cosine"),
    )


@dataclasses.dataclass(frozen=True)
class Prediction(AsymmetricViews, Momentum, Projection, AugmentationOptions):
    """Options of methods that predict the momentum encoder's projections."""

    jitter: tuple[float, ...] = override(
        AugmentationOptions, "jitter", (0.4, 0.4, 0.2, 0.1)
    )
    key_momentum: float = override(
        Momentum, "key_momentum", AUTO, published=0.996
    )
    key_momentum_schedule: str = override(
        Momentum, "key_momentum_schedule", "cosine"
    )
    projection_size: int = override(Projection, "projection_size", 256)
    projection_hidden: int = override(Projection, "projection_hidden", 4096)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Strong views and their loss, the distributional divergence (DDM)."""

    strong_crops: tuple[Crop, ...] = option(
        (Crop(96, 0.086, 0.429),),
        "crops of the strong views",
        group="views",
    )
    strong_ops: int = option(
        5,
        "strong operations drawn per strong view. Each is applied with "
        "probability 1/2",
        minimum=0,
        group="views",
    )
    strong_pool: str = option(
        "released",
        "strong operations: 14 with whole levels, as in the published code "
        "(released), or with Invert instead of Identity and continuous levels, "
        "as in the paper (paper)",
        choices=lambda: tuple(strong.POOLS),
        group="views",
    )
    strong_level: int = option(
        strong.MAX_LEVEL,
        "limit L of the strength of strong operations: whole levels 1 to L - 1 "
        "(released), or any level from 0 to L (paper)",
        minimum=2,
        maximum=strong.MAX_LEVEL,
        group="views",
    )
    ddm_weight: float = option(
        0.0,
        "weight of the divergence (DDM) relative to the method's own loss; 0: "
        "no divergence and no strong views",
        minimum=0.0,
    )
    ddm_temperature: float = option(
        0.2, "temperature T of the divergence (DDM)", above=0.0
    )
    ddm_teacher: str = option(
        "online",
        "encoder whose weak views supervise the strong views: the trained "
        "encoder (online), as in the released code, or the momentum encoder",
        choices=("online", "momentum"),
    )

    @property
    def uses_strong_views(self):
        """Whether any loss uses strong views."""
        return self.ddm_weight > 0

    def strong_views(self):
        """The strong `View`s `strong_0`, ...; empty if no loss uses them."""
        if not self.uses_strong_views:
            return []
        return [
            self.view(
                f"strong_{i}",
                crop,
                strong_ops=self.strong_ops,
                strong_pool=self.strong_pool,
                strong_level=self.strong_level,
            )
            for i, crop in enumerate(self.strong_crops)
        ]

    def check_divergence(self, *, momentum):
        """Raises `UserError` for invalid options of the divergence.

        Args:
            momentum: whether the method has a momentum encoder.
        """
        if self.ddm_weight and not self.strong_crops:
            raise UserError(
                f"Expected --strong_crops with --ddm_weight={self.ddm_weight:g}"
                ", received none; add them, such as "
                "--strong_crops=96:0.086:0.429, or set --ddm_weight=0."
            )
        if self.ddm_teacher == "momentum" and not momentum:
            raise UserError(
                "Expected --ddm_teacher=online for a method without a momentum "
                "encoder, received momentum; set --ddm_teacher=online."
            )
