"""Views: how they are declared, and what is drawn for each.

`chain` makes them.
"""

import dataclasses

import tensorflow as tf

from clsa_tf.augment import crop, primitives, strong, weak
from clsa_tf.errors import UserError

_MAX_JITTER = 10.0
# What one view may share with another, each drawn on its own, and the settings
# that it is drawn with.
_SETTINGS = {
    "crop": ("min_area", "max_area"),
    "jitter": ("jitter", "jitter_probability"),
    "gray": ("gray",),
    "blur": ("blur",),
    "flip": ("flip",),
    "rotation": ("rotation",),
    "texture": ("texture",),
    "solarize": ("solarize",),
    "strong": ("strong_ops", "strong_pool", "strong_level"),
}
PARTS = tuple(_SETTINGS)
_PROBABILITIES = (
    "jitter_probability",
    "gray",
    "blur",
    "flip",
    "texture",
    "solarize",
)


@dataclasses.dataclass(frozen=True)
class View:
    """What one crop of the image goes through.

    In this order: rotation, colour jitter, greyscale, texture, blur,
    solarisation, flip, strong operations. A part that is off by default costs
    nothing then.

    Attributes:
        name: key of the view in a batch, such as `"query_0"`.
        size: side of the square result, in pixels.
        min_area: smallest share of the image's area a crop covers, in (0, 1].
        max_area: largest share, in [min_area, 1].
        strong_ops: length of the sequence of strong operations that follows
            the weak chain; 0 for a weak view, 5 in CLSA.
        strong_pool: what they are drawn from, a key of `strong.POOLS`.
        strong_level: bound of their levels, in 2..10 (see `strong.draw`).
        blur: probability of the weak chain's Gaussian blur, in [0, 1].
        shuffle: whether the rows of this view are permuted over the global
            batch (ShuffleBN of MoCo, done by the loader).
        both_orders: with `shuffle`, whether the rows are also needed in the
            order of the batch, because both encoders see the view.
        like: name of an earlier view with which this one shares `shared`.
        shared: those of `PARTS` that are drawn for `like` and used for both,
            which must have the same settings of them.
        jitter: strengths of brightness, contrast, saturation, which multiply
            by [max(0, 1 - strength), 1 + strength], and of hue, which turns
            the colour circle by that share of it at most, in [0, 0.5].
        jitter_probability: of all four together, in random order, in [0, 1].
        gray: probability of greyscale, in [0, 1].
        gray_first: whether greyscale precedes the jitter, as in MoCo v1.
        flip: probability of the horizontal flip, in [0, 1].
        rotation: whether to rotate by 0, 90, 180 or 270 degrees, each equally
            likely.
        texture: probability of a random texture, in [0, 1]; see
            `texture.randomize`.
        solarize: probability of inverting all bytes from 128 on, in [0, 1].

    Raises:
        UserError: a size, area, count, strength or probability is out of
            range.
    """

    name: str
    size: int
    min_area: float
    max_area: float
    strong_ops: int = 0
    strong_pool: str = "released"
    strong_level: int = strong.MAX_LEVEL
    blur: float = 0.5
    shuffle: bool = False
    both_orders: bool = False
    like: str = ""
    shared: tuple[str, ...] = ()
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    gray: float = 0.2
    gray_first: bool = False
    flip: float = 0.5
    rotation: bool = False
    texture: float = 0.0
    solarize: float = 0.0

    def __post_init__(self):
        if self.size < 1:
            raise UserError(
                f"Expected view {self.name!r} to be at least 1 pixel wide, "
                f"received size {self.size}; choose a positive size."
            )
        if not 0 < self.min_area <= self.max_area <= 1:
            raise UserError(
                f"Expected 0 < min_area <= max_area <= 1 for view "
                f"{self.name!r}, received {self.min_area} and "
                f"{self.max_area}; give both as shares of the image's area."
            )
        self._check_weak()
        if (
            self.strong_ops < 0
            or self.strong_pool not in strong.POOLS
            or not 2 <= self.strong_level <= strong.MAX_LEVEL
        ):
            raise UserError(
                "Expected strong_ops of at least 0, a strong_pool of "
                f"{', '.join(strong.POOLS)} and a strong_level in "
                f"2..{strong.MAX_LEVEL} for view {self.name!r}, received "
                f"{self.strong_ops}, {self.strong_pool!r} and "
                f"{self.strong_level}; choose others."
            )
        if not set(self.shared) <= set(PARTS) or bool(self.shared) != bool(
            self.like
        ):
            raise UserError(
                f"Expected view {self.name!r} to share some of "
                f"{', '.join(PARTS)} with a view named in `like`, received "
                f"shared={self.shared!r} and like={self.like!r}; give both."
            )

    def _check_weak(self):
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"Expected {name} in [0, 1] for view {self.name!r}, "
                    f"received {getattr(self, name)}; give a probability."
                )
        limits = (_MAX_JITTER,) * 3 + (0.5,)
        if len(self.jitter) != len(limits) or not all(
            0 <= strength <= limit
            for strength, limit in zip(self.jitter, limits)
        ):
            raise UserError(
                "Expected strengths of the jitter of brightness, contrast and "
                f"saturation in [0, {_MAX_JITTER:g}] and of hue in [0, 0.5] "
                f"for view {self.name!r}, received {self.jitter!r}; choose "
                "others."
            )


def number_slices(views):
    """Which uniform numbers each part of each view is drawn from.

    Args:
        views: sequence of `View`.

    Returns:
        (dict of (view name, part) -> slice, count of numbers).

    Raises:
        UserError: a view shares with one that is not before it, or a part that
            the two draw with different settings.
    """
    slices, before, count = {}, {}, 0
    for view in views:
        _check_sharing(view, before)
        counts = {"crop": crop.NUM_UNIFORMS, **weak.num_uniforms(view)}
        counts["strong"] = strong.NUM_UNIFORMS * view.strong_ops
        for part, number in counts.items():
            if part in view.shared:
                slices[view.name, part] = slices[view.like, part]
            else:
                slices[view.name, part] = slice(count, count + number)
                count += number
        before[view.name] = view
    return slices, count


def _check_sharing(view, before):
    if view.like and view.like not in before:
        raise UserError(
            f"Expected view {view.name!r} to come after the view "
            f"{view.like!r} that it shares with, received it after "
            f"{', '.join(before) or 'none'}; reorder the views."
        )
    for part in view.shared:
        for setting in _SETTINGS[part]:
            own, other = (
                getattr(x, setting) for x in (view, before[view.like])
            )
            if own != other:
                raise UserError(
                    f"Expected views {view.like!r} and {view.name!r}, which "
                    f"share {part!r}, to have the same {setting}, received "
                    f"{other!r} and {own!r}; make them equal or share less."
                )


def _draw_view(view, numbers, size):
    params = {
        "box": crop.draw_box(
            numbers["crop"],
            height=size[0],
            width=size[1],
            min_area=view.min_area,
            max_area=view.max_area,
        ),
        **weak.draw(numbers, view),
    }
    if view.strong_ops:
        params["strong"] = strong.draw(
            tf.reshape(
                numbers["strong"], [strong.NUM_UNIFORMS, view.strong_ops]
            ),
            pool=view.strong_pool,
            max_level=view.strong_level,
        )
    return params


def draw(seed, size, *, views):
    """Draws everything random about the views of one image.

    Args:
        seed: i32[2].
        size: i32[2], height and width of the image in pixels.
        views: sequence of `View`. What a view gets does not depend on the
            views after it.

    Returns:
        dict, view name -> dict of `box` i32[4] (see `crop.draw_box`), the
        entries of `weak.draw` and, for a strong view, `strong`, a dict (see
        `strong.draw`; `strong.describe` puts it in words).

    Raises:
        UserError: views that cannot share what they are to share.
    """
    slices, count = number_slices(views)
    uniform = primitives.uniform(seed, shape=[count])
    result = {}
    for view in views:
        numbers = {part: uniform[slices[view.name, part]] for part in PARTS}
        result[view.name] = _draw_view(view, numbers, size)
    return result


def _specs(view):
    """What `draw` returns for a view."""
    specs = {"box": tf.TensorSpec([4], tf.int32), **weak.specs(view)}
    if view.strong_ops:
        specs["strong"] = strong.specs(view.strong_ops)
    return specs


def packed_width(view):
    """Count of the numbers that `draw` returns for a view."""
    specs = tf.nest.flatten(_specs(view))
    return sum(spec.shape.num_elements() for spec in specs)


def pack(params):
    """Puts what `draw` returns into one tensor: f32[n], view by view.

    Nothing is lost: all numbers are float32, or integers below 2**24.
    """
    flat = [x for view in params.values() for x in tf.nest.flatten(view)]
    flat = [tf.reshape(tf.cast(x, tf.float32), [-1]) for x in flat]
    return tf.concat(flat, axis=0)


def split_packed(packed, *, views):
    """Splits rows of `pack`: f32[N,n] -> dict, view name -> f32[N,p]."""
    parts = tf.split(packed, [packed_width(view) for view in views], axis=1)
    return {view.name: part for view, part in zip(views, parts)}


def unpack(packed, view):
    """Gives what was drawn for a view its names and types back.

    Args:
        packed: f32[N,p], rows of one view: `batch[params_key(view)]`.
        view: the `View`.

    Returns:
        dict of what `draw` returns for it, with a leading axis N throughout.
    """
    specs = _specs(view)
    flat = tf.nest.flatten(specs)
    parts = tf.split(packed, [x.shape.num_elements() for x in flat], axis=1)
    values = [
        tf.cast(tf.reshape(part, [-1, *x.shape]), x.dtype)
        for part, x in zip(parts, flat)
    ]
    return tf.nest.pack_sequence_as(specs, values)


def shuffled_copy(view):
    """The view under which a batch holds permuted rows beside the others."""
    return dataclasses.replace(view, name=f"{view.name}_shuffled")


def params_key(view):
    """Key, in a batch, of what was drawn for a view: f32[N,p], see `unpack`."""
    return f"{view.name}_params"
