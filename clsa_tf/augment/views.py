"""Declaration of views, and the random parameters of each.

`chain` makes the views.
"""

import dataclasses

import tensorflow as tf

from clsa_tf.augment import crop, primitives, strong, weak
from clsa_tf.errors import UserError

_MAX_JITTER = 10.0
# Parts that are drawn independently and that two views may share, and the
# settings of each.
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
    """One view: a random resized crop and its augmentations.

    The order is rotation, colour jitter, greyscale, texture, blur,
    solarisation, flip, strong operations. Optional parts that are off cost
    nothing.

    Attributes:
        name: key of the view in a batch, such as `"query_0"`.
        size: side of the square result, in pixels.
        min_area: smallest crop as a share of the image's area, in (0, 1].
        max_area: largest crop as a share of the area, in [min_area, 1].
        strong_ops: length of the sequence of strong operations after the weak
            chain; 0 for a weak view, 5 in CLSA.
        strong_pool: pool of the strong operations, a key of `strong.POOLS`.
        strong_level: bound of their levels, in 2..10 (see `strong.draw`).
        blur: probability of the weak chain's Gaussian blur, in [0, 1].
        shuffle: whether the rows of this view are permuted over the global
            batch (ShuffleBN of MoCo; the loader does it).
        both_orders: with `shuffle`, whether the batch also holds the rows in
            their original order, because both encoders see the view.
        like: name of an earlier view that this one shares parts with.
        shared: parts, from `PARTS`, whose parameters are drawn for `like` and
            used for both. Both views need the same settings of these parts.
        jitter: strengths of brightness, contrast and saturation, whose factors
            are in [max(0, 1 - strength), 1 + strength], and of hue, the largest
            shift as a share of the colour circle, in [0, 0.5].
        jitter_probability: probability of the jitter, in [0, 1]. All four
            changes are applied together, in random order.
        gray: probability of greyscale, in [0, 1].
        gray_first: whether greyscale precedes the jitter, as in MoCo v1.
        flip: probability of the horizontal flip, in [0, 1].
        rotation: whether to rotate by 0, 90, 180 or 270 degrees, each equally
            likely.
        texture: probability of a random texture, in [0, 1]; see
            `texture.randomize`.
        solarize: probability of inverting all bytes of at least 128, in [0, 1].

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
                f"Expected a size of at least 1 pixel for view {self.name!r}, "
                f"received {self.size}; use a larger one."
            )
        if not 0 < self.min_area <= self.max_area <= 1:
            raise UserError(
                f"Expected 0 < min_area <= max_area <= 1 for view "
                f"{self.name!r}, received {self.min_area} and "
                f"{self.max_area}; use shares of the image's area."
            )
        self._check_weak()
        if (
            self.strong_ops < 0
            or self.strong_pool not in strong.POOLS
            or not 2 <= self.strong_level <= strong.MAX_LEVEL
        ):
            raise UserError(
                "Expected strong_ops of at least 0, strong_pool one of "
                f"{', '.join(strong.POOLS)} and strong_level in "
                f"2..{strong.MAX_LEVEL} for view {self.name!r}, received "
                f"{self.strong_ops}, {self.strong_pool!r} and "
                f"{self.strong_level}; use values in these ranges."
            )
        if not set(self.shared) <= set(PARTS) or bool(self.shared) != bool(
            self.like
        ):
            raise UserError(
                f"Expected both `shared`, parts from {', '.join(PARTS)}, and "
                f"`like`, an earlier view, for view {self.name!r}, received "
                f"shared={self.shared!r} and like={self.like!r}; set both or "
                "none."
            )

    def _check_weak(self):
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"Expected {name} in [0, 1] for view {self.name!r}, "
                    f"received {getattr(self, name)}; use a probability."
                )
        limits = (_MAX_JITTER,) * 3 + (0.5,)
        if len(self.jitter) != len(limits) or not all(
            0 <= strength <= limit
            for strength, limit in zip(self.jitter, limits)
        ):
            raise UserError(
                "Expected four jitter strengths for view "
                f"{self.name!r}, brightness, contrast and saturation in "
                f"[0, {_MAX_JITTER:g}] and hue in [0, 0.5], received "
                f"{self.jitter!r}; use values in these ranges."
            )


def number_slices(views):
    """Assigns a slice of the uniform numbers to each part of each view.

    Args:
        views: sequence of `View`.

    Returns:
        (dict of (view name, part) -> slice, total count of numbers).

    Raises:
        UserError: a view shares parts with a view that does not precede it, or
            a part for which the two have different settings.
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
            f"Expected view {view.like!r} before view {view.name!r}, which "
            f"shares parts with it, received {', '.join(before) or 'none'} "
            "before it; reorder the views."
        )
    for part in view.shared:
        for setting in _SETTINGS[part]:
            own, other = (
                getattr(x, setting) for x in (view, before[view.like])
            )
            if own != other:
                raise UserError(
                    f"Expected the same {setting} for views {view.like!r} and "
                    f"{view.name!r}, which share {part!r}, received {other!r} "
                    f"and {own!r}; make them equal or do not share {part!r}."
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
    """Draws all random parameters of the views of one image.

    Args:
        seed: i32[2].
        size: i32[2], height and width of the image in pixels.
        views: sequence of `View`. The parameters of a view do not depend on the
            views after it.

    Returns:
        dict, view name -> dict of `box` i32[4] (see `crop.draw_box`), the
        entries of `weak.draw` and, for a strong view, `strong`, a dict (see
        `strong.draw` and `strong.describe`).

    Raises:
        UserError: a view shares parts that it cannot share, see
            `number_slices`.
    """
    slices, count = number_slices(views)
    uniform = primitives.uniform(seed, shape=[count])
    result = {}
    for view in views:
        numbers = {part: uniform[slices[view.name, part]] for part in PARTS}
        result[view.name] = _draw_view(view, numbers, size)
    return result


def _specs(view):
    """`TensorSpec`s of the result of `draw` for a view."""
    specs = {"box": tf.TensorSpec([4], tf.int32), **weak.specs(view)}
    if view.strong_ops:
        specs["strong"] = strong.specs(view.strong_ops)
    return specs


def packed_width(view):
    """Count p of the numbers that `draw` returns for a view."""
    specs = tf.nest.flatten(_specs(view))
    return sum(spec.shape.num_elements() for spec in specs)


def pack(params):
    """Packs the result of `draw` into one tensor f32[n], view by view.

    This is lossless: all numbers are float32, or integers below 2**24.
    """
    flat = [x for view in params.values() for x in tf.nest.flatten(view)]
    flat = [tf.reshape(tf.cast(x, tf.float32), [-1]) for x in flat]
    return tf.concat(flat, axis=0)


def split_packed(packed, *, views):
    """Splits rows of `pack`: f32[N,n] -> dict, view name -> f32[N,p]."""
    parts = tf.split(packed, [packed_width(view) for view in views], axis=1)
    return {view.name: part for view, part in zip(views, parts)}


def unpack(packed, view):
    """Inverse of `pack` for the rows of one view.

    Args:
        packed: f32[N,p], rows of one view: `batch[params_key(view)]`.
        view: the `View`.

    Returns:
        dict as `draw` returns for this view, with a leading axis N.
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
    """The `View` of the permuted rows, if a batch holds both orders."""
    return dataclasses.replace(view, name=f"{view.name}_shuffled")


def params_key(view):
    """Key in a batch of a view's parameters f32[N,p], see `unpack`."""
    return f"{view.name}_params"
