"""What training images are made into, drawn."""

import numpy as np
import tensorflow as tf

from clsa_tf import methods
from clsa_tf.augment import crop, strong, weak
from clsa_tf.augment.strong_ops import STRONG_OPS
from clsa_tf.augment.views import params_key, unpack
from clsa_tf.data import headers
from clsa_tf.data.checks import check_drawn_sizes
from clsa_tf.data.decode import try_decode
from clsa_tf.data.open import open_train_source
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.unreadable import Faults
from clsa_tf.errors import UserError
from clsa_tf.plots import sheet
from clsa_tf.terminal import progress

LEVELS = range(1, strong.MAX_LEVEL)


ROWS = 6  # images in the picture of a run


MAX_SIDE = 512  # px of the longer side that are kept of an original


def gallery(config, path, *, images):
    """Draws views of a training's first images, and its strong operations.

    Args:
        config: `clsa_tf.config.Config`.
        path: PNG file to write.
        images: how many to show, at most.

    Returns:
        uint8 `[H, W, 3]`, the picture.

    Raises:
        UserError: the dataset cannot be opened, or its images not be read.
    """
    if not config.dataset:
        raise UserError(
            "Expected --dataset, received none; name what the images are "
            "taken from, such as folder:/photos."
        )
    views = methods.load(config.method).METHOD.views(config.options)
    check_drawn_sizes(
        config.dataset, views, allow_upscaling=config.allow_upscaling
    )
    source = open_train_source(config)
    for note in source.notes:
        progress.say(note)
    images = min(images, source.size)
    batch = first_batch(config, source, views, images)
    originals = first_images(config, source, images)
    readable = [original for original in originals if original]
    if not readable:
        raise UserError(
            f"Expected images that can be read in {source.name}, received "
            f"{images} that cannot; repair or remove them."
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
        source: `Source` that it trains on.
        views: sequence of `View`.
        batch: the finished batch of `step`, with what was drawn for it.
        step: counted from 0.
        path: PNG file to write.

    Returns:
        uint8 `[H, W, 3]`, the picture.
    """
    size = config.batch_size
    originals = first_images(config, source, size, start=step * size, most=ROWS)
    grid = views_grid(config.method, views, batch, originals)
    return sheet.sheet([grid], path)


def first_batch(config, source, views, size):
    """The first batch of a training, were its batches of `size` images."""
    faults = Faults(max_bad_share=config.max_bad_share)
    batches = training_batches(
        source,
        views,
        batch_size=size,
        seed=config.seed,
        start_step=0,
        faults=faults,
        keep_params=True,
    )
    try:
        return next(iter(batches))
    except tf.errors.InvalidArgumentError as e:
        if faults.error():
            raise faults.error() from e
        raise


def first_images(config, source, count, *, start=0, most=None):
    """The images that a batch of `count` images is made of.

    Args:
        config: `clsa_tf.config.Config`.
        source: `Source` of the batch.
        count: images in the batch.
        start: counter of its first one, see `Source`.
        most: of them that can be read; no further ones are looked at.

    Returns:
        list of (uint8 `[H, W, 3]`, shrunk to `MAX_SIDE` px if larger; its size
        before, in words); None instead of an image that cannot be read.
    """
    examples = source.examples(
        start=start,
        seed=config.seed,
        shuffle=True,
        repeat=True,
        size=source.size - source.size % count if config.whole_epochs else None,
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
    """A `pictures.Grid` of images, by rows, and their views.

    Args:
        method: name of what the views are for.
        views: sequence of `View`.
        batch: of these, with what was drawn.
        originals: what `first_images` returns for it. Rows of unreadable ones
            are left out: other images stand in for them in the batch.
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
        # Captions of operations need 120 px.
        min(max(640 // len(columns), 120), 224),
    )


def captions(batch, view):
    """What was done to each row of a view beyond MoCo v2's weak chain.

    Args:
        batch: of the pipeline, with what was drawn.
        view: one of its `View`s.

    Returns:
        for each example of the batch, in its order, a list of strings: the
        rotation, texture and solarisation, if any, and the strong operations
        applied, first to last; empty lists for a plain weak view.
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
    """A `pictures.Grid` of the operations, by rows, and their levels.

    Args:
        views: strong `View`s, whose pools are shown.
        image: uint8 `[H, W, 3]`, resized to the first view's size.
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
    """What an operation makes of an image, level by level.

    Args:
        image: uint8 `[H, W, 3]`.
        name: one of `strong.NAMES`. Of the signed ones the positive sign is
            shown, of those without level one picture.

    Returns:
        list of `pictures.Cell`, the parameter under the image.
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
    """Puts rows of a view that was shuffled back into the batch's order.

    Args:
        batch: dictionary, as `training_batches` yields it.
        view: the `View`.
        rows: its images, `batch[view.name]`, or what was drawn for them; a
            tensor or a structure of tensors, `[G, ...]`.

    Returns:
        `rows` as arrays; row n belongs to example n.
    """
    order = slice(None)
    if view.shuffle and not view.both_orders:
        order = np.argsort(batch[f"{view.name}_order"])
    return tf.nest.map_structure(lambda x: np.asarray(x)[order], rows)
