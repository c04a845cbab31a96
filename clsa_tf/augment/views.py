"""Views: what is drawn for each, and how crops become views.

Three steps, which may run in different places: `draw` decides everything
random about the views of one image; `crop_views` cuts and resizes (always on
the host: its shapes vary); `finish` does the rest, on the host or on the
accelerator, and gives the same bytes in both.
"""

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from clsa_tf.augment import crop, primitives, strong, weak
from clsa_tf.errors import UserError

# What one view may share with another, each drawn on its own.
PARTS = ("crop", *weak.NEEDS, "strong")


@dataclasses.dataclass(frozen=True)
class View:
    """What one crop of the image goes through.

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
            batch (MoCo's shuffled batch normalisation, done by the loader).
        like: name of an earlier view with which this one shares `shared`.
        shared: those of `PARTS` that are drawn for `like` and used for both;
            "crop" is one rectangle for equal areas.

    Raises:
        UserError: a size, area, count or probability is out of range.
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
    like: str = ""
    shared: tuple[str, ...] = ()

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
        if self.strong_ops < 0 or not 0 <= self.blur <= 1:
            raise UserError(
                f"Expected strong_ops of at least 0 and blur in [0, 1] for "
                f"view {self.name!r}, received {self.strong_ops} and "
                f"{self.blur}; choose others."
            )
        if self.strong_pool not in strong.POOLS or not (
            2 <= self.strong_level <= strong.MAX_LEVEL
        ):
            raise UserError(
                f"Expected a strong_pool of {', '.join(strong.POOLS)} and a "
                f"strong_level in 2..{strong.MAX_LEVEL} for view "
                f"{self.name!r}, received {self.strong_pool!r} and "
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


def _shares(views):
    """Which uniform numbers each part of each view is drawn from.

    Returns:
        (dict of (view name, part) -> slice, count of numbers).

    Raises:
        UserError: a view shares with one that is not before it, or strong
            sequences of different lengths.
    """
    slices, lengths, count = {}, {}, 0
    for view in views:
        needs = {"crop": crop.NEEDS, **weak.NEEDS}
        needs["strong"] = strong.NEEDS * view.strong_ops
        for part, need in needs.items():
            if part in view.shared:
                if lengths.get((view.like, part)) != need:
                    raise UserError(
                        f"Expected view {view.name!r} to come after a view "
                        f"{view.like!r} with the same strong_ops, received "
                        f"the views {', '.join(v.name for v in views)}; "
                        "reorder them or share less."
                    )
                slices[view.name, part] = slices[view.like, part]
            else:
                slices[view.name, part] = slice(count, count + need)
                count += need
            lengths[view.name, part] = need
    return slices, count


def _numbers(uniform, slices, name):
    """What each part of a view is drawn from: {part: f32[n]}."""
    return {part: uniform[slices[name, part]] for part in PARTS}


def _draw_box(view, numbers, size):
    return crop.draw_box(
        numbers["crop"],
        height=size[0],
        width=size[1],
        min_area=view.min_area,
        max_area=view.max_area,
    )


def _draw_chain(view, numbers):
    """What happens to a view after the crop."""
    params = weak.draw(
        **{part: numbers[part] for part in weak.NEEDS},
        blur_probability=view.blur,
    )
    if view.strong_ops:
        params["strong"] = strong.draw(
            tf.reshape(numbers["strong"], [strong.NEEDS, view.strong_ops]),
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
    slices, count = _shares(views)
    uniform = primitives.uniform(seed, shape=[count])
    result = {}
    for view in views:
        numbers = _numbers(uniform, slices, view.name)
        box = _draw_box(view, numbers, size)
        result[view.name] = {"box": box, **_draw_chain(view, numbers)}
    return result


def crop_views(image, boxes, *, views):
    """Cuts one crop per view out of an image and resizes it.

    Args:
        image: u8[H,W,3].
        boxes: f32[V,4] or i32[V,4], a row per view (see `crop.resize_boxes`).
        views: sequence of V `View`s.

    Returns:
        dict, view name -> f32[size,size,3], column by column (see
        `crop.resize_boxes`).
    """
    sizes = [view.size for view in views]
    crops = crop.resize_boxes(image, boxes, sizes=sizes)
    return {view.name: pixels for view, pixels in zip(views, crops)}


def finish(crops, params, *, views):
    """Turns crops into views: the weak chain, then strong operations if any.

    Crops of one size and kind go through together: through everything, and
    each keeps what was drawn, which is best for accelerators. Hosts have
    `finish_crops`, in which a view runs through what was drawn for it only.
    The bytes are the same.

    Args:
        crops: dict, view name -> u8[N,size,size,3], column by column.
        params: dict, view name -> what `draw` returns for it, with a leading
            axis N throughout.
        views: sequence of `View`.

    Returns:
        dict, view name -> u8[N,size,size,3], row by row.

    Source: maple-research-lab/CLSA@37df76c, Multi_FixTransform.py, up to the
    conversion to float.
    """
    kinds = {}
    for view in views:
        kind = (view.size, view.strong_ops)
        kinds.setdefault(kind, []).append(view.name)
    result = {}
    for names in kinds.values():
        images = tf.concat([crops[name] for name in names], axis=0)
        columns = [params[name] for name in names]
        stacked = tf.nest.map_structure(
            lambda *rows: tf.concat(rows, axis=0), *columns
        )
        images = _chain(images, stacked)
        result.update(zip(names, tf.split(images, len(names), axis=0)))
    return result


def _chain(images, params):
    """u8[N,x,y,3] column by column -> u8[N,y,x,3] row by row."""
    planes = tf.transpose(images, [0, 3, 1, 2])  # [N,3,x,y]
    planes = weak.apply(planes, params)  # [N,3,y,x]
    if "strong" in params:
        planes = strong.apply(planes, params["strong"])
    return tf.transpose(planes, [0, 2, 3, 1])


# --- compiled by XLA, which fuses what would else be hundreds of passes ------

_SEED = _SIZE = tf.TensorSpec([2], tf.int32)


def _compiled(function, signature=None):
    return tf.function(
        function, input_signature=signature, jit_compile=True, autograph=False
    )


@functools.lru_cache(maxsize=None)
def compiled_draw(views):
    """`draw` for a tuple of views: (seed, size) -> parameters."""
    return _compiled(functools.partial(draw, views=views), [_SEED, _SIZE])


@functools.lru_cache(maxsize=None)
def compiled_boxes(views):
    """What hosts draw before they decode: (seed, size) -> (boxes, numbers).

    On a host each tensor that leaves a compiled function costs as much as
    hundreds of numbers drawn. So only the boxes, i32[V,4], leave this one, and
    the uniform numbers from which `finish_crops` draws the rest.
    """
    slices, count = _shares(views)

    def boxes(seed, size):
        uniform = primitives.uniform(seed, shape=[count])
        rows = [
            _draw_box(view, _numbers(uniform, slices, view.name), size)
            for view in views
        ]
        return tf.stack(rows), uniform

    return _compiled(boxes, [_SEED, _SIZE])


def finish_crops(crops, numbers, *, views):
    """`finish` on the host, for one image.

    Args:
        crops: what `crop_views` returns.
        numbers: f32[n], from `compiled_boxes`.
        views: tuple of `View`.

    Returns:
        dict, view name -> u8[size,size,3], row by row.
    """
    slices, _ = _shares(views)
    result = {}
    for view in views:
        own = [slices[view.name, part] for part in (*weak.NEEDS, "strong")]
        index = np.concatenate([np.r_[x] for x in own]).astype(np.int32)
        # Views that differ in none of the other fields share one program.
        kind = dataclasses.replace(
            view, name="", like="", shared=(), min_area=1, max_area=1
        )
        result[view.name] = _compiled_chain(kind)(
            crops[view.name], tf.gather(numbers, index)
        )
    return result


@functools.lru_cache(maxsize=None)
def _compiled_chain(view):
    """(crop f32[size,size,3], numbers f32[n]) -> u8[size,size,3]."""

    def chain(pixels, numbers):
        parts = {**weak.NEEDS, "strong": strong.NEEDS * view.strong_ops}
        split = tf.split(numbers, list(parts.values()))
        params = _draw_chain(view, dict(zip(parts, split)))
        images, params = tf.nest.map_structure(
            lambda x: x[tf.newaxis], (crop.to_bytes(pixels), params)
        )
        return _chain(images, params)[0]

    needs = sum(weak.NEEDS.values()) + strong.NEEDS * view.strong_ops
    return _compiled(
        chain,
        [
            tf.TensorSpec([view.size, view.size, 3], tf.float32),
            tf.TensorSpec([needs], tf.float32),
        ],
    )


@functools.lru_cache(maxsize=None)
def _compiled_finish_batch(views):
    return _compiled(functools.partial(finish, views=views))


def params_key(view):
    """Key, in a batch, of what was drawn for a view."""
    return f"{view.name}_params"


def finish_batch(batch, *, views):
    """Completes the views of an unfinished batch, for accelerators.

    Compiled by XLA, also if the caller is not.

    Args:
        batch: rows of a batch of `training_batches(..., finished=False)`: for
            each view its name -> u8[N,size,size,3], column by column, and
            `params_key` -> what was drawn.
        views: those that it was made with.

    Returns:
        the batch with finished views.
    """
    crops = {view.name: batch[view.name] for view in views}
    params = {view.name: batch[params_key(view)] for view in views}
    return batch | _compiled_finish_batch(tuple(views))(crops, params)
