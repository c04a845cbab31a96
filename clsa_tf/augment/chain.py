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
    """Turns crops into views: weak chain, then strong operations if any.

    Views that need the same program are concatenated and run as one batch.
    Every branch is computed for every image, and each image keeps the result of
    its own parameters. This suits accelerators.

    Args:
        crops: dict, view name -> u8[N,size,3,size], column-major.
        packed: dict, view name -> drawn parameters f32[N,p], see `unpack`.
        views: sequence of `View`.

    Returns:
        dict, view name -> u8[N,size,size,3], row-major.

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
    """Returns a `View` with only the settings that change the program.

    Views of equal kind differ in their drawn parameters only, so they share one
    compiled program.
    """
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
    """u8[N,x,3,y] column-major, f32[N,p] -> u8[N,y,x,3] row-major."""
    params = unpack(packed, kind)
    planes = tf.transpose(images, [0, 2, 1, 3])  # [N,3,x,y]
    planes = weak.apply(planes, params, gray_first=kind.gray_first)  # [N,3,y,x]
    if "strong" in params:
        planes = strong.apply(planes, params["strong"])
    return tf.transpose(planes, [0, 2, 3, 1])


# --- compiled by XLA, which fuses hundreds of passes over the pixels ---------

# Programs that each cache below holds. Each program keeps memory of its own. A
# run needs a few; the bound lets long-lived processes (tests, notebooks) drop
# the programs of earlier runs.
_MAX_PROGRAMS = 64


def _compiled(function, signature=None):
    return tf.function(
        function, input_signature=signature, jit_compile=True, autograph=False
    )


@functools.lru_cache(maxsize=_MAX_PROGRAMS)
def compiled_draw(views):
    """Compiles `draw` for K images and a tuple of V views.

    On a host, each tensor that a compiled function returns costs as much as
    drawing hundreds of numbers. Therefore all parameters except the boxes are
    returned as one tensor.

    Returns:
        function (seeds i32[K,2], sizes i32[K,2]) -> (boxes i32[K,V,4],
        rows of `pack` f32[K,n]).

    Raises:
        UserError: a view shares parts that it cannot share, see
            `number_slices`.
    """
    # Checked here as well: an error inside `tf.map_fn` leaves its variable
    # scope open, and then no model can be built.
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
    """Crops and resizes K images on the host, and completes the views.

    Args:
        images: list of K u8[H,W,3].
        boxes: i32[K,V,4] or f32[K,V,4], from `compiled_draw`, in pixels of
            these images.
        packed: dict, view name -> f32[K,p], from `split_packed`.
        views: sequence of V `View`s.
        completed: whether to complete the views, see `complete`.

    Returns:
        dict, view name -> u8[K,size,size,3], row-major, if completed; otherwise
        u8[K,size,3,size], column-major.
    """
    sizes = [view.size for view in views]
    crops = crop.rectangles(images, boxes, sizes=sizes)
    result, before = {}, []
    for view, row in zip(views, crops):
        # One view at a time, so that its crops stay in the processor's cache.
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


@functools.lru_cache(maxsize=_MAX_PROGRAMS)
def _compiled_view(view, count):
    """Compiles (crops u8[K,size,3,size], f32[K,p]) -> u8[K,size,size,3].

    Each crop runs only the branches that were drawn for it. This suits hosts.
    """

    def make(arguments):
        image, packed = (x[tf.newaxis] for x in arguments)
        return _chain(image, packed, view)[0]

    def make_all(crops, packed):
        return tf.map_fn(make, (crops, packed), fn_output_signature=tf.uint8)

    crops = tf.TensorSpec([count, view.size, 3, view.size], tf.uint8)
    drawn = tf.TensorSpec([count, packed_width(view)], tf.float32)
    return _compiled(make_all, [crops, drawn])


@functools.lru_cache(maxsize=_MAX_PROGRAMS)
def _compiled_complete(views):
    return _compiled(functools.partial(complete, views=views))


def complete_batch(batch, *, views):
    """Completes the views of a batch of crops on the accelerator.

    XLA compiles this, whether or not it compiles the caller.

    Args:
        batch: rows of a batch of `training_batches(..., completed=False)`: for
            each view its name -> u8[N,size,3,size], column-major, and its
            `params_key` -> drawn parameters f32[N,p].
        views: sequence of the `View`s that the batch was made with.

    Returns:
        the batch with completed views u8[N,size,size,3].
    """
    crops = {view.name: batch[view.name] for view in views}
    packed = {view.name: batch[params_key(view)] for view in views}
    return batch | _compiled_complete(tuple(views))(crops, packed)
