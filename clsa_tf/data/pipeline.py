"""Batches of views for training, and of centre crops for evaluation.

A training batch is a pure function of (seed, step): the batch of step `s`
holds the examples with counters `s * G` to `s * G + G - 1`, whatever the
number of threads and wherever the dataset was started.
"""

import dataclasses
from typing import Optional, Sequence

import tensorflow as tf

from clsa_tf.augment import crop
from clsa_tf.augment.views import View, make_view
from clsa_tf.data.decode import try_decode
from clsa_tf.data.faults import Faults
from clsa_tf.data.order import ROWS, VIEWS, Source, key
from clsa_tf.errors import UserError

PREFETCHED_BATCHES = 2


def training_batches(
    source: Source,
    views: Sequence[View],
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    faults: Faults,
    parallel_calls: Optional[int] = None,
) -> tf.data.Dataset:
    """Returns the endless dataset of batches from a step on.

    Each example is decoded once; every view of it has a seed of its own, from
    (seed, counter, index of the view). Unreadable images are replaced by the
    next readable one of the batch, cyclically, and reported to `faults`, which
    ends the dataset with an error if there are too many.

    Memory: two finished batches, the one being made (up to twice), and the
    decoded image and the views of one example per parallel call.

    Args:
        source: where the images come from.
        views: what each image is made into.
        batch_size: G, examples in a global batch.
        seed: seed of everything random.
        start_step: step of the first batch.
        faults: told about unreadable images; after an error from the iterator
            `faults.error()` says whether it was that.
        parallel_calls: images made at the same time; None leaves it to
            tf.data. It does not change the batches.

    Returns:
        Dataset of dicts: for each view its name -> u8[G, S, S, 3]. The rows
        of a view with `shuffle` are permuted; `"<name>_rows"` i32[G] says
        which example (row of the unshuffled views) each of its rows shows.

    Raises:
        UserError: the batch is larger than the dataset.
    """
    if batch_size > source.size:
        raise UserError(
            f"Expected a batch of at most {source.size} images, the size of "
            f"{source.name}, received {batch_size}; lower --batch_size or add "
            "images."
        )

    def finish(batch):
        step = batch["counter"][0] // batch_size
        with tf.control_dependencies(
            [_report(batch, step - start_step + 1, source, faults)]
        ):
            donors = _next_valid(batch["valid"])  # [G]
        return _arrange(batch, donors, views, seed, step)

    examples = source.examples(
        start=start_step * batch_size, seed=seed, shuffle=True, repeat=True
    )
    batches = examples.map(
        _views_of_example(views, seed),
        num_parallel_calls=parallel_calls or tf.data.AUTOTUNE,
        deterministic=True,
    ).batch(batch_size, drop_remainder=True)
    return _finished(batches.map(finish))


def evaluation_batches(
    source: Source,
    *,
    image_size: int,
    keep: float,
    batch_size: int,
    faults: Faults,
    limit: Optional[int] = None,
) -> tf.data.Dataset:
    """Returns one pass over a source, always in the same order.

    Unreadable images are left out, and reported to `faults`.

    Args:
        source: where the images come from.
        image_size: S, side of the centre crops, in pixels.
        keep: share of the short side that the crop keeps, in (0, 1].
        batch_size: B; the last batch may be smaller.
        faults: see `training_batches`.
        limit: take so many at most, drawn at random but always the same.

    Returns:
        Dataset of (u8[B, S, S, 3], label i64[B]), labels -1 if there are none.
    """

    def make_crop(example):
        worked, image = try_decode(example["bytes"])
        cropped = crop.central(image, size=image_size, keep=keep)
        cropped = tf.ensure_shape(cropped, [image_size, image_size, 3])
        return {"valid": worked, "image": cropped, **example}

    def readable(example):
        def report():
            noted = faults.report_op(
                example["name"][None],
                source=source,
                seen=example["counter"] + 1,
                lost=tf.constant(False),
            )
            with tf.control_dependencies([noted]):
                return tf.constant(False)

        return tf.cond(example["valid"], lambda: True, report)

    part = limit is not None and limit < source.size
    # The first ones may be of one class.
    examples = source.examples(start=0, seed=0, shuffle=part, repeat=False)
    if part:
        examples = examples.take(limit)
    crops = examples.map(
        make_crop, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    ).filter(readable)
    batches = crops.map(lambda e: (e["image"], e["label"])).batch(batch_size)
    return _finished(batches)


def _views_of_example(views, seed):
    """Returns the function from an example to its views."""
    makers = _makers(views)

    def make_views(example):
        worked, image = try_decode(example["bytes"])
        result = {
            "valid": worked,
            "name": example["name"],
            "counter": example["counter"],
        }
        for i, (view, maker) in enumerate(zip(views, makers)):
            view_seed = _view_seed(seed, example["counter"], i)
            result[view.name] = maker(image, view_seed)
        return result

    return make_views


def _makers(views):
    """Returns a function (image, seed) -> view for each of the views.

    Views that differ in name only share one: CLSA has five such, and tracing
    them one by one would double the time until the first batch.
    """
    shared = {}

    def make(view):
        image = tf.TensorSpec([None, None, 3], tf.uint8)
        seed = tf.TensorSpec([2], tf.int32)
        return tf.function(
            lambda image, seed: make_view(image, seed, view=view),
            input_signature=[image, seed],
        )

    def maker(view):
        kind = dataclasses.replace(view, name="", shuffle=False)
        if kind not in shared:
            shared[kind] = make(kind)
        return shared[kind]

    return [maker(view) for view in views]


def _view_seed(seed, counter, index):
    """Returns i32[2], of which all 64 bits depend on all arguments."""
    bits = tf.random.stateless_uniform(
        [], key(seed, VIEWS, counter, index), None, None, tf.int64
    )
    return tf.bitcast(bits, tf.int32)  # [2]


def _next_valid(valid):
    """For each row, the row that shows instead: itself if it is valid."""
    size = tf.size(valid)
    rows = tf.cast(tf.where(valid)[:, 0], tf.int32)  # [number of valid]
    following = tf.searchsorted(rows, tf.range(size))  # [G]
    return tf.gather(rows, following % tf.size(rows))  # [G]


def _arrange(batch, donors, views, seed, step):
    """Replaces invalid rows, permutes those of shuffled views."""
    size = donors.shape[0]
    result = {}
    for i, view in enumerate(views):
        images = batch[view.name]  # [G, S, S, 3]
        if view.shuffle:
            rows = tf.random.experimental.stateless_shuffle(
                tf.range(size), key(seed, ROWS, step, i)
            )  # [G]
            result[f"{view.name}_rows"] = rows
            images = tf.gather(images, tf.gather(donors, rows))
        else:
            images = tf.cond(
                tf.reduce_all(batch["valid"]),
                lambda images=images: images,
                lambda images=images: tf.gather(images, donors),
            )
        result[view.name] = tf.ensure_shape(
            images, [size, view.size, view.size, 3]
        )
    return result


def _report(batch, batches_seen, source, faults):
    valid = batch["valid"]  # [G]

    def report():
        names = tf.boolean_mask(batch["name"], ~valid)
        seen = batches_seen * tf.size(valid, tf.int64)
        lost = ~tf.reduce_any(valid)
        return faults.report_op(names, source=source, seen=seen, lost=lost)

    return tf.cond(tf.reduce_all(valid), tf.no_op, report)


def _finished(batches):
    options = tf.data.Options()
    options.deterministic = True
    # With several workers, each takes its share of every pass; files (the
    # default) may be fewer than workers.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return batches.prefetch(PREFETCHED_BATCHES).with_options(options)
