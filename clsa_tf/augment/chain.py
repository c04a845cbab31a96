"""Makes views from decoded images.

1. `compiled_draw` draws all random parameters.
2. `make_views` crops and resizes. This runs on the host, because crops differ
   in shape. By default it also completes the views.
3. `complete_batch` completes them on the accelerator instead. Completing a view
   means: weak chain, then strong operations.

Host and accelerator give the same bytes.
"""

import functools

import tensorflow as tf

from clsa_tf.augment import crop, strong, weak
from clsa_tf.augment.views import (
    View,
    draw,
    number_slices,
    pack,
    packed_width,
    params_key,
    unpack,
)


def complete(crops, packed, *, views):
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
        images = _chain(images, rows, kind)
        result.update(zip(names, tf.split(images, len(names), axis=0)))
    return result


def _kind(view):
    """Views of one kind differ in what is drawn only."""
    return View(
        "",
        view.size,
        1.0,
        1.0,
        strong_ops=view.strong_ops,
        gray_first=view.gray_first,
        rotation=view.rotation,
        texture=float(view.texture > 0),
        solarize=float(view.solarize > 0),
    )


def _chain(images, packed, kind):
    """u8[N,x,3,y] column by column, f32[N,p] -> u8[N,y,x,3] row by row."""
    params = unpack(packed, kind)
    planes = tf.transpose(images, [0, 2, 1, 3])  # [N,3,x,y]
    planes = weak.apply(planes, params, gray_first=kind.gray_first)  # [N,3,y,x]
    if "strong" in params:
        planes = strong.apply(planes, params["strong"])
    return tf.transpose(planes, [0, 2, 3, 1])


# --- compiled by XLA, which fuses what would else be hundreds of passes ------


def _compiled(function, signature=None):
    return tf.function(
        function, input_signature=signature, jit_compile=True, autograph=False
    )


@functools.lru_cache(maxsize=None)
def compiled_draw(views):
    """`draw` for K images and a tuple of V views, compiled.

    Each tensor that leaves a compiled function costs a host as much as
    hundreds of numbers drawn, so that all but the boxes leave as one.

    Returns:
        function (seeds i32[K,2], sizes i32[K,2]) -> (boxes i32[K,V,4],
        rows of `pack` f32[K,n]).

    Raises:
        UserError: views that cannot share what they are to share.
    """
    # Here too: an error within `tf.map_fn` would leave its variable scope in a
    # state in which no model can be built.
    number_slices(views)

    def draw_one(arguments):
        params = draw(*arguments, views=views)
        boxes = tf.stack([params[view.name]["box"] for view in views])
        return boxes, pack(params)

    def draw_all(seeds, sizes):
        return tf.map_fn(
            draw_one, (seeds, sizes), fn_output_signature=(tf.int32, tf.float32)
        )

    pairs = tf.TensorSpec([None, 2], tf.int32)
    return _compiled(draw_all, [pairs, pairs])


def make_views(images, boxes, packed, *, views, completed=True):
    """Cuts the crops of all views out of K images; on the host.

    Args:
        images: list of K u8[H,W,3].
        boxes: i32[K,V,4] or f32[K,V,4], from `compiled_draw`, in pixels of
            these images.
        packed: dict, view name -> f32[K,p], from `split_packed`.
        views: sequence of V `View`s.
        completed: whether to do what `complete` does too.

    Returns:
        dict, view name -> u8[K,size,size,3], row by row; unfinished
        u8[K,size,3,size], column by column.
    """
    sizes = [view.size for view in views]
    crops = crop.rectangles(images, boxes, sizes=sizes)
    result, before = {}, []
    for view, row in zip(views, crops):
        # One after the other, each while it is in the processor's cache.
        pixels = []
        for rectangle in row:
            with tf.control_dependencies(before):
                before = [rectangle.resize()]
            pixels += before
        pixels = tf.stack(pixels)
        if completed:
            program = _compiled_view(_kind(view), len(images))
            pixels = program(pixels, packed[view.name])
        result[view.name] = pixels
        before = [pixels]
    return result


@functools.lru_cache(maxsize=None)
def _compiled_view(view, count):
    """(crops u8[K,size,3,size], f32[K,p]) -> views u8[K,size,size,3].

    A crop runs through what was drawn for it only.
    """

    def make(arguments):
        image, packed = (x[tf.newaxis] for x in arguments)
        return _chain(image, packed, view)[0]

    def make_all(crops, packed):
        return tf.map_fn(make, (crops, packed), fn_output_signature=tf.uint8)

    crops = tf.TensorSpec([count, view.size, 3, view.size], tf.uint8)
    drawn = tf.TensorSpec([count, packed_width(view)], tf.float32)
    return _compiled(make_all, [crops, drawn])


@functools.lru_cache(maxsize=None)
def _compiled_complete(views):
    return _compiled(functools.partial(complete, views=views))


def complete_batch(batch, *, views):
    """Completes the views of an unfinished batch, for accelerators.

    Compiled by XLA, also if the caller is not.

    Args:
        batch: rows of a batch of `training_batches(..., completed=False)`: for
            each view its name -> u8[N,size,3,size], column by column, and
            `params_key` -> what was drawn.
        views: those that it was made with.

    Returns:
        the batch with finished views.
    """
    crops = {view.name: batch[view.name] for view in views}
    packed = {view.name: batch[params_key(view)] for view in views}
    return batch | _compiled_complete(tuple(views))(crops, packed)
