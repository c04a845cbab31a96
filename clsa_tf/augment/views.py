"""Views: what is drawn for each, and how crops become views.

Three steps, which may run in different places: `draw` decides everything
random about the views of one image; `make_views` cuts and resizes (always on
the host: its shapes vary); `finish` does the rest, on the accelerator, or
`make_views` does it too. The bytes are the same.
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


def finish(crops, packed, *, views):
    """Turns crops into views: the weak chain, then strong operations if any.

    Crops of one size and kind go through together: through everything, and
    each keeps what was drawn, which is best for accelerators.

    Args:
        crops: dict, view name -> u8[N,size,3,size], column by column.
        packed: dict, view name -> what was drawn, f32[N,p] for `unpack`.
        views: sequence of `View`.

    Returns:
        dict, view name -> u8[N,size,size,3], row by row.

    Source: maple-research-lab/CLSA@37df76c, Multi_FixTransform.py, up to the
    conversion to float.
    """
    kinds = {}
    for view in views:
        kinds.setdefault(_kind(view), []).append(view.name)
    result = {}
    for kind, names in kinds.items():
        images = tf.concat([crops[name] for name in names], axis=0)
        rows = tf.concat([packed[name] for name in names], axis=0)
        images = _chain(images, unpack(rows, kind))
        result.update(zip(names, tf.split(images, len(names), axis=0)))
    return result


def _kind(view):
    """Views of one kind differ in what is drawn only."""
    return View("", view.size, 1.0, 1.0, strong_ops=view.strong_ops)


def _chain(images, params):
    """u8[N,x,3,y] column by column -> u8[N,y,x,3] row by row."""
    planes = tf.transpose(images, [0, 2, 1, 3])  # [N,3,x,y]
    planes = weak.apply(planes, params)  # [N,3,y,x]
    if "strong" in params:
        planes = strong.apply(planes, params["strong"])
    return tf.transpose(planes, [0, 2, 3, 1])


# --- compiled by XLA, which fuses what would else be hundreds of passes ------


def _compiled(function, signature=None):
    return tf.function(
        function, input_signature=signature, jit_compile=True, autograph=False
    )


def _specs(view):
    """What `draw` returns for a view."""
    specs = {"box": tf.TensorSpec([4], tf.int32), **weak.SPECS}
    if view.strong_ops:
        specs["strong"] = strong.specs(view.strong_ops)
    return specs


def _width(view):
    specs = tf.nest.flatten(_specs(view))
    return sum(x.shape.num_elements() for x in specs)


def unpack(packed, view):
    """Gives what was drawn for a view its names and types back.

    Args:
        packed: f32[N,p], rows of a batch's `params_key(view)`.
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


@functools.lru_cache(maxsize=None)
def compiled_draw(views):
    """`draw` for K images and a tuple of V views, compiled.

    Each tensor that leaves a compiled function costs a host as much as
    hundreds of numbers drawn, so that all but the boxes leave as one.

    Returns:
        function (seeds i32[K,2], sizes i32[K,2]) -> (boxes i32[K,V,4], packed
        f32[K,n]): all that was drawn, view by view, as numbers that float32
        holds exactly. `unpack` takes the columns of one view.
    """

    def draw_one(arguments):
        params = draw(*arguments, views=views)
        boxes = tf.stack([params[view.name]["box"] for view in views])
        flat = tf.nest.flatten([params[view.name] for view in views])
        flat = [tf.reshape(tf.cast(x, tf.float32), [-1]) for x in flat]
        return boxes, tf.concat(flat, axis=0)

    def draw_all(seeds, sizes):
        return tf.map_fn(
            draw_one, (seeds, sizes), fn_output_signature=(tf.int32, tf.float32)
        )

    pairs = tf.TensorSpec([None, 2], tf.int32)
    return _compiled(draw_all, [pairs, pairs])


def split_packed(packed, *, views):
    """Splits f32[N,n] from `compiled_draw`: dict, view name -> f32[N,p]."""
    parts = tf.split(packed, [_width(view) for view in views], axis=1)
    return {view.name: part for view, part in zip(views, parts)}


def make_views(images, boxes, packed, *, views, finished=True):
    """Cuts the crops of all views out of K images; on the host.

    Args:
        images: list of K u8[H,W,3].
        boxes: i32[K,V,4] or f32[K,V,4], from `compiled_draw`, in pixels of
            these images.
        packed: f32[K,n], from `compiled_draw`.
        views: sequence of V `View`s.
        finished: whether to do what `finish` does too.

    Returns:
        dict, view name -> u8[K,size,size,3], row by row; unfinished
        u8[K,size,3,size], column by column.
    """
    sizes = [view.size for view in views]
    crops = crop.rectangles(images, boxes, sizes=sizes)
    drawn = split_packed(packed, views=views)
    result, before = {}, []
    for view, row in zip(views, crops):
        # One view after the other, each while it is in the processor's cache.
        with tf.control_dependencies(before):
            pixels = [rectangle.resize() for rectangle in row]
        program = _compiled_view(_kind(view), len(images), finished)
        result[view.name] = program(pixels, drawn[view.name])
        before = [result[view.name]]
    return result


@functools.lru_cache(maxsize=None)
def _compiled_view(view, count, finished):
    """(list of K f32[size,3,size], f32[K,p]) -> K views, crops if unfinished.

    A view runs through what was drawn for it only.
    """

    def program(crops, packed):
        def make(i):
            # Only this one is rounded; stacked, all would be, for each.
            image = tf.switch_case(
                i, [lambda x=x: crop.to_bytes(x) for x in crops]
            )
            if not finished:
                return image
            params = unpack(tf.gather(packed, [i]), view)
            return _chain(image[tf.newaxis], params)[0]

        return tf.map_fn(make, tf.range(count), fn_output_signature=tf.uint8)

    pixels = tf.TensorSpec([view.size, 3, view.size], tf.float32)
    drawn = tf.TensorSpec([count, _width(view)], tf.float32)
    return _compiled(program, [[pixels] * count, drawn])


@functools.lru_cache(maxsize=None)
def _compiled_finish_batch(views):
    return _compiled(functools.partial(finish, views=views))


def params_key(view):
    """Key, in a batch, of what was drawn for a view: f32[N,p], see `unpack`."""
    return f"{view.name}_params"


def finish_batch(batch, *, views):
    """Completes the views of an unfinished batch, for accelerators.

    Compiled by XLA, also if the caller is not.

    Args:
        batch: rows of a batch of `training_batches(..., finished=False)`: for
            each view its name -> u8[N,size,3,size], column by column, and
            `params_key` -> what was drawn.
        views: those that it was made with.

    Returns:
        the batch with finished views.
    """
    crops = {view.name: batch[view.name] for view in views}
    packed = {view.name: batch[params_key(view)] for view in views}
    return batch | _compiled_finish_batch(tuple(views))(crops, packed)
