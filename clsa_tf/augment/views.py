"""Views: what is drawn for each, and how crops become views.

Three steps, which may run in different places: `draw` decides everything
random about the views of one image; `crop_views` cuts and resizes (always on
the host: its shapes vary); `finish` does the rest, on the host or on the
accelerator, and gives the same bytes in both.
"""

import dataclasses
import functools

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
        own = {part: uniform[slices[view.name, part]] for part in PARTS}
        params = weak.draw(
            **{part: own[part] for part in weak.NEEDS},
            blur_probability=view.blur,
        )
        params["box"] = crop.draw_box(
            own["crop"],
            height=size[0],
            width=size[1],
            min_area=view.min_area,
            max_area=view.max_area,
        )
        if view.strong_ops:
            params["strong"] = strong.draw(
                tf.reshape(own["strong"], [strong.NEEDS, view.strong_ops]),
                pool=view.strong_pool,
                max_level=view.strong_level,
            )
        result[view.name] = params
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

    A batch of one runs only through what was drawn for it, which is best for
    processors. In a larger one, crops of one size and kind go together through
    everything, and each keeps what was drawn, which is best for accelerators.
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
    single = crops[views[0].name].shape[0] == 1
    kinds = {}
    for view in views:
        kind = view.name if single else (view.size, view.strong_ops)
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
    planes = tf.transpose(images, [0, 3, 2, 1])  # [N,3,y,x]
    planes = weak.apply(planes, params)
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
    """The boxes alone: (seed, size) -> i32[V,4].

    On a host each tensor that leaves a compiled function costs more than to
    draw it again, so that all the rest is drawn within `compiled_finish`.
    """

    def boxes(seed, size):
        params = draw(seed, size, views=views)
        return tf.stack([params[view.name]["box"] for view in views])

    return _compiled(boxes, [_SEED, _SIZE])


@functools.lru_cache(maxsize=None)
def compiled_finish(views):
    """`finish` for what `crop_views` returns: (crops, seed, size) -> views."""

    def finish_one(crops, seed, size):
        crops = tf.nest.map_structure(crop.to_bytes, crops)
        rows = tf.nest.map_structure(
            lambda x: x[tf.newaxis], (crops, draw(seed, size, views=views))
        )
        return {
            name: images[0]
            for name, images in finish(*rows, views=views).items()
        }

    crops = {
        view.name: tf.TensorSpec([view.size, view.size, 3], tf.float32)
        for view in views
    }
    return _compiled(finish_one, [crops, _SEED, _SIZE])


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
