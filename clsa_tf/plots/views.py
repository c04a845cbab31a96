"""Draws training images with their views and strong operations."""

import numpy as np
import tensorflow as tf

from clsa_tf import methods
from clsa_tf.augment import crop, strong, weak
from clsa_tf.augment.strong_ops import STRONG_OPS
from clsa_tf.augment.views import params_key, unpack
from clsa_tf.data import headers
from clsa_tf.data.decode import try_decode
from clsa_tf.data.open import open_train_source
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.source_checks import check_drawn_sizes
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.errors import UserError
from clsa_tf.plots import sheet
from clsa_tf.terminal import progress

LEVELS = range(1, strong.MAX_LEVEL)  # levels of the operations to draw
ROWS = 6  # images in the picture of a run
MAX_SIDE = 512  # longer side, in px, to which originals are shrunk


def gallery(config, path, *, images):
    """Draws views of a training's first images, and its strong operations.

    Args:
        config: `clsa_tf.config.Config`.
        path: PNG file to write.
        images: largest number of images to show.

    Returns:
        the picture as uint8 `[H, W, 3]`.

    Raises:
        UserError: the dataset cannot be opened, or none of the images can be
            read.
    """
    if not config.dataset:
        raise UserError(
            "Expected --dataset, received none; set it, for example to "
            "folder:/photos."
        )
    views = methods.class_of(config).views(config.options)
    check_drawn_sizes(
        config.dataset, views, allow_upscaling=config.allow_upscaling
    )
    source = open_train_source(config)
    for note in source.notes:
        progress.write(note)
    images = min(images, source.size)
    batch = first_batch(config, source, views, images)
    originals = first_images(config, source, images)
    readable = [original for original in originals if original]
    if not readable:
        raise UserError(
            f"Expected readable images in {source.name}, received {images} "
            "unreadable ones; repair or remove them."
        )
    grids = [views_grid(config.method, views, batch, originals)]
    strong_views = [view for view in views if view.strong_ops]
    if strong_views:
        grids.append(operations_grid(strong_views, readable[0][0]))
    return sheet.sheet(grids, path)


def draw_batch(config, source, views, batch, step, path):
    """Draws some images of a batch of a run, and their views.

    Args:
        config: `clsa_tf.config.Config` of the run.
        source: the run's training `Source`.
        views: sequence of `View`.
        batch: the completed batch of `step`, including its parameters
            (`params_key`).
        step: number of the step, from 0.
        path: PNG file to write.

    Returns:
        the picture as uint8 `[H, W, 3]`.
    """
    size = config.batch_size
    originals = first_images(config, source, size, start=step * size, most=ROWS)
    grid = views_grid(config.method, views, batch, originals)
    return sheet.sheet([grid], path)


def first_batch(config, source, views, size):
    """Makes the first batch of a training with batches of `size` images."""
    unreadable = UnreadableImages(max_bad_share=config.max_bad_share)
    batches = training_batches(
        source,
        views,
        batch_size=size,
        seed=config.seed,
        start_step=0,
        unreadable=unreadable,
        keep_params=True,
    )
    try:
        return next(iter(batches))
    except tf.errors.InvalidArgumentError as e:
        if unreadable.error():
            raise unreadable.error() from e
        raise


def first_images(config, source, count, *, start=0, most=None):
    """Reads the original images of a batch of `count` images.

    Args:
        config: `clsa_tf.config.Config`.
        source: `Source` of the batch.
        count: images in the batch.
        start: counter of its first image, see `Source`.
        most: stop after this number of readable images; None: read all.

    Returns:
        list of (image uint8 `[H, W, 3]`, shrunk to `MAX_SIDE` px if larger,
        text with its original size); None in place of an unreadable image.
    """
    examples = source.examples(
        start=start,
        seed=config.seed,
        shuffle=True,
        repeat=True,
        size=source.epoch_size(count, config.whole_epochs),
    )
    found = []
    for example in examples.take(count):
        code, image = try_decode(
            example["bytes"], source.rules, code=example["code"]
        )
        height, width = image.shape[:2]
        size = f"{width} x {height} px"
        good = code == headers.OK
        found.append((_shrink(image), size) if good else None)
        if len(found) - found.count(None) == most:
            break
    return found


def _shrink(image):
    sides = np.array(image.shape[:2])
    sides = np.maximum(1, np.round(sides * min(1, MAX_SIDE / max(sides))))
    resized = tf.image.resize(image, sides.astype(int), antialias=True)
    return tf.cast(tf.round(resized), tf.uint8).numpy()


def views_grid(method, views, batch, originals):
    """Arranges originals and their views, one image per row.

    Args:
        method: name of the method, for the title.
        views: sequence of `View`.
        batch: batch of these views, including their parameters.
        originals: result of `first_images` for the batch. Rows of unreadable
            images are omitted, because the batch has other images there.

    Returns:
        `sheet.Grid`.
    """
    rows = [i for i, original in enumerate(originals) if original]
    cell = sheet.Cell
    columns = [[cell(originals[i][0], [originals[i][1]]) for i in rows]]
    for view in views:
        made = unshuffled(batch, view, batch[view.name])
        words = captions(batch, view)
        columns.append([cell(made[i], words[i]) for i in rows])
    title = f"{method}: training images and their views"
    if any(view.strong_ops for view in views):
        title += "; below a strong view, the operations in their order"
    titles = [f"{v.name.replace('_', ' ')}\n{v.size} px" for v in views]
    return sheet.Grid(
        title,
        ["image\n"] + titles,
        [""] * len(rows),
        list(zip(*columns)),
        # Captions of operations need at least 120 px.
        min(max(640 // len(columns), 120), 224),
    )


def captions(batch, view):
    """Describes the augmentations of each row beyond MoCo v2's weak chain.

    Args:
        batch: batch of the pipeline, including parameters.
        view: one of its `View`s.

    Returns:
        for each example of the batch, in order, a list of str: rotation,
        texture and solarisation, if any, then the applied strong operations in
        order. The lists are empty for a plain weak view.
    """
    params = unpack(batch[params_key(view)], view)
    params = unshuffled(batch, view, params)

    def caption(i):
        row = tf.nest.map_structure(lambda x: x[i], params)
        words = weak.describe(row)
        if "strong" in row:
            words += strong.describe(row["strong"]) or ["no operation"]
        return words

    return [caption(i) for i in range(len(params["box"]))]


def operations_grid(views, image):
    """Arranges the strong operations, one per row, at all levels.

    Args:
        views: strong `View`s; the operations of their pools are shown.
        image: uint8 `[H, W, 3]`. It is resized to the first view's size.

    Returns:
        `sheet.Grid`.
    """
    image = crop.central(image, size=views[0].size, crop_ratio=1)
    pool = {name for v in views for name in strong.POOLS[v.strong_pool]}
    names = [name for name in strong.NAMES if name in pool]
    return sheet.Grid(
        "strong operations one by one; signs are positive",
        [f"level {level}" for level in LEVELS],
        names,
        [operation(image, name) for name in names],
        64,
    )


def operation(image, name):
    """Applies a strong operation to an image at all levels.

    Signed operations are shown with the positive sign. Operations without a
    level give one picture.

    Args:
        image: uint8 `[H, W, 3]`.
        name: one of `strong.NAMES`.

    Returns:
        list of `sheet.Cell` with the operation's parameter as the caption.
    """
    levels = LEVELS if STRONG_OPS[name].parameter else [1]
    levels = np.array(levels, np.int32) * strong.LEVEL_STEPS  # [L]
    sign = np.ones_like(levels)
    planes = tf.transpose(image, [2, 0, 1])  # [3, H, W]
    made = strong.apply_one(
        tf.tile(planes[tf.newaxis], [len(levels), 1, 1, 1]),
        tf.constant(sign * strong.NAMES.index(name)),
        tf.constant(levels),
        tf.constant(sign),
    )  # [L, 3, H, W]
    made = tf.transpose(made, [0, 2, 3, 1]).numpy()
    words = [
        strong.describe_one(name, level, 1).removeprefix(name).strip()
        for level in levels
    ]
    return [
        sheet.Cell(shown, [text or "no level"])
        for shown, text in zip(made, words)
    ]


def unshuffled(batch, view, rows):
    """Restores the order of the batch in the rows of a shuffled view.

    Args:
        batch: dict, as `training_batches` yields it.
        view: the `View`.
        rows: images `batch[view.name]` or parameters of the view; a tensor or a
            nest of tensors `[G, ...]`.

    Returns:
        `rows` as arrays; row n belongs to example n.
    """
    order = slice(None)
    if view.shuffle and not view.both_orders:
        order = np.argsort(batch[f"{view.name}_order"])
    return tf.nest.map_structure(lambda x: np.asarray(x)[order], rows)
