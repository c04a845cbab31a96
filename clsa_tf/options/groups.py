"""Options that several methods share, so that a flag means the same in each.

A method's `Options` inherits the groups it needs and changes their defaults.
"""

import dataclasses

from clsa_tf.augment import strong
from clsa_tf.augment.views import View
from clsa_tf.errors import UserError
from clsa_tf.networks.heads import Head
from clsa_tf.options.fields import AUTO, Crop, option, override


@dataclasses.dataclass(frozen=True)
class AugmentationOptions:
    """The weak augmentation, and how crops are encoded."""

    jitter: tuple[float, ...] = option(
        (0.4, 0.4, 0.4, 0.1),
        "strengths of the colour jitter: brightness, contrast and saturation "
        "by factors of 1 - strength to 1 + strength, hue by up to this share "
        "of the colour circle",
        group="views",
    )
    jitter_probability: float = option(
        0.8,
        "probability, in [0, 1], of the jitter",
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
        "greyscale before the jitter, as in MoCo v1, instead of after it",
        group="views",
    )
    blur: float = option(
        0.5,
        "probability, in [0, 1], of a view's Gaussian blur of 0.1 to 2 px; 0 "
        "for images of about 32 to 64 px",
        minimum=0.0,
        maximum=1.0,
        group="views",
    )
    join_crops: bool = option(
        False,
        "crops of equal size go through the encoder together and share their "
        "batch statistics (SimCLR, SwAV), instead of one after the other",
        group="network",
    )
    over_crops: str = option(
        "mean",
        "how the losses of several crops of an image are combined",
        choices=("sum", "mean"),
    )

    def view(self, name, crop, **details):
        """Returns the `View` called `name` that shows `crop`."""
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
        """Sum or mean, as `--over_crops` says, of a list of `[N]`."""
        total = sum(losses[1:], start=losses[0])
        return total / len(losses) if self.over_crops == "mean" else total


@dataclasses.dataclass(frozen=True)
class AsymmetricViews:
    """Two views of the same crop with unequal blur and solarisation.

    Source: BYOL (arXiv 2006.07733), appendix B.
    """

    crop: Crop = option(
        Crop(224, 0.08, 1.0),
        "crop of the two views, size:min_area:max_area (px, shares)",
        group="views",
    )
    view_blur: tuple[float, ...] = option(
        (1.0, 0.1),
        "probabilities, in [0, 1], of the two views' blur",
        group="views",
    )
    view_solarize: tuple[float, ...] = option(
        (0.0, 0.2),
        "probabilities, in [0, 1], of the two views' solarisation",
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
        """Raises `UserError` unless there are two probabilities of each."""
        for name in ("view_blur", "view_solarize"):
            value = getattr(self, name)
            if len(value) != 2 or not all(0 <= x <= 1 for x in value):
                raise UserError(
                    f"Expected two probabilities in [0, 1] for --{name}, "
                    f"received {','.join(map(str, value))}; give them "
                    "separated by a comma."
                )


@dataclasses.dataclass(frozen=True)
class Projection:
    """The projection head."""

    head_kind = "plain"

    projection_size: int = option(
        128,
        "D, width of the projection",
        minimum=2,
        group="network",
    )
    projection_layers: int = option(
        2,
        "linear layers of the projection head",
        minimum=1,
        group="network",
    )
    projection_hidden: int = option(
        0,
        "width of the projection head's hidden layers; 0: as wide as the "
        "features",
        minimum=0,
        group="network",
    )

    # Heads side by side, and whether their hidden layers are the features.
    heads = 1
    concatenate = False

    @property
    def head(self):
        """The `Head` of the encoder."""
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
        "m of the momentum encoder's moving average, in [0, 1]; at the start, "
        "if it is scheduled; auto: 0.999 (byol and cacr_mocov3: 0.996), less "
        "for runs of fewer than 40 / (1 - m) steps",
        minimum=0.0,
        maximum=1.0,
        published=0.999,
    )
    key_momentum_schedule: str = option(
        "constant",
        "whether m stays, or rises to 1 along half a cosine",
        choices=("constant", "cosine"),
    )


@dataclasses.dataclass(frozen=True)
class Prediction(AsymmetricViews, Momentum, Projection, AugmentationOptions):
    """What the methods that predict a momentum encoder's targets share."""

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
    """Strong views, and the divergence (DDM) through which they are taught."""

    strong_crops: tuple[Crop, ...] = option(
        (Crop(96, 0.086, 0.429),),
        "crops of the strongly augmented queries",
        group="views",
    )
    strong_ops: int = option(
        5,
        "strong operations drawn per strong view, each applied with "
        "probability 1/2",
        minimum=0,
        group="views",
    )
    strong_pool: str = option(
        "released",
        "pool of the strong operations: the 14 with whole levels of the "
        "released code, or the paper's (Invert instead of Identity, continuous "
        "levels)",
        choices=tuple(strong.POOLS),
        group="views",
    )
    strong_level: int = option(
        strong.MAX_LEVEL,
        "bound, in 2..10, of the strong operations' levels: 1 to one below it "
        "(released), 0 to it (paper)",
        minimum=2,
        maximum=strong.MAX_LEVEL,
        group="views",
    )
    ddm_weight: float = option(
        0.0,
        "weight of the divergence beside the method's own loss; 0: none, and "
        "no strong views",
        minimum=0.0,
    )
    ddm_temperature: float = option(
        0.2, "T of the divergence's distributions", above=0.0
    )
    ddm_teacher: str = option(
        "online",
        "encoder whose weak view teaches the strong ones: the trained one, as "
        "released, or the momentum encoder",
        choices=("online", "momentum"),
    )

    @property
    def uses_strong_views(self):
        """Whether strong views take part in any loss."""
        return self.ddm_weight > 0

    def strong_views(self):
        """The strong `View`s `strong_0`, ...; none if they are not used."""
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
        """Raises `UserError` for options of the divergence that cannot be.

        Args:
            momentum: whether the method has a momentum encoder.
        """
        if self.ddm_weight and not self.strong_crops:
            raise UserError(
                "Expected strong views for the divergence, received "
                f"--ddm_weight={self.ddm_weight:g} and no --strong_crops; give "
                "them, such as --strong_crops=96:0.086:0.429, or set "
                "--ddm_weight=0."
            )
        if self.ddm_teacher == "momentum" and not momentum:
            raise UserError(
                "Expected --ddm_teacher=online of a method that has no "
                "momentum encoder, received momentum; change it."
            )
