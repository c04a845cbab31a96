"""Batches of centre crops for evaluation, always in the same order."""

from typing import Optional

import tensorflow as tf

from clsa_tf.augment import crop
from clsa_tf.data import headers
from clsa_tf.data.decode import try_decode
from clsa_tf.data.order import ALONE, Worker, prefetch_in_order
from clsa_tf.data.source import Source
from clsa_tf.data.unreadable import UnreadableImages


# AutoGraph would take seconds to convert functions that have no use for it.
@tf.autograph.experimental.do_not_convert
def evaluation_batches(
    source: Source,
    *,
    image_size: int,
    crop_ratio: float,
    batch_size: int,
    unreadable: UnreadableImages,
    limit: Optional[int] = None,
    names: bool = False,
) -> tf.data.Dataset:
    """Returns one pass over a source, always in the same order.

    Unreadable images are left out and reported to `unreadable`.

    Args:
        source: where the images come from.
        image_size: S, side of the centre crops, in pixels.
        crop_ratio: share of the short side that the crop keeps, in (0, 1].
        batch_size: B; the last batch may be smaller.
        unreadable: see `pipeline.training_batches`.
        limit: largest number of images. They are drawn at random, but are the
            same each time.
        names: whether to include the names of the images.

    Returns:
        Dataset of (u8[B, S, S, 3], label i64[B]). Labels are -1 if there are
        none. With `names` a third element, string[B], holds the names; see
        `Source.examples`.
    """

    part = limit is not None and limit < source.size
    # A part is shuffled, because the first images may all be of one class.
    examples = source.examples(start=0, seed=0, shuffle=part, repeat=False)
    if part:
        examples = examples.take(limit)
    crops = _crops(examples, source, image_size, crop_ratio).filter(
        _readable(source, unreadable)
    )
    fields = ("image", "label", "name")[: 3 if names else 2]
    batches = crops.map(lambda e: tuple(e[field] for field in fields))
    return prefetch_in_order(batches.batch(batch_size), prefetch=2)


@tf.autograph.experimental.do_not_convert
def indexed_batches(
    source: Source,
    *,
    image_size: int,
    crop_ratio: float,
    batch_size: int,
    unreadable: UnreadableImages,
    worker: Worker = ALONE,
) -> tf.data.Dataset:
    """Returns one pass over a source with random access, with indices.

    Args:
        source: where the images come from.
        image_size: S, side of the centre crops, in pixels.
        crop_ratio: share of the short side that the crop keeps, in (0, 1].
        batch_size: B, size of the global batch.
        unreadable: collects the names of unreadable images.
        worker: which part of each global batch this process makes.

    Returns:
        Dataset of (u8[b, S, S, 3], index i32[b]), `b` rows of each global
        batch. The index is -1 for unreadable images and for rows that pad the
        last batch.
    """
    count = -(-source.size // batch_size) * batch_size
    rows = worker.rows(batch_size)
    numbers = tf.data.Dataset.range(count).batch(
        batch_size, drop_remainder=True
    )
    examples = (
        numbers.map(lambda batch: batch[rows])
        .unbatch()
        .map(lambda i: (i, i % source.size))
        .map(
            source.example,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
    )
    readable = _readable(source, unreadable)

    def row(example):
        use = (example["counter"] < source.size) & readable(example)
        index = tf.where(use, tf.cast(example["counter"], tf.int32), -1)
        return example["image"], index

    crops = _crops(examples, source, image_size, crop_ratio).map(row)
    share = batch_size // worker.count
    return prefetch_in_order(
        crops.batch(share, drop_remainder=True), prefetch=2
    )


def _crops(examples, source, image_size, crop_ratio):
    """Adds the centre crop as `image`, and updates `code`."""

    def make_crop(example):
        code, image = try_decode(
            example["bytes"], source.rules, code=example["code"]
        )
        cropped = crop.central(image, size=image_size, crop_ratio=crop_ratio)
        cropped = tf.ensure_shape(cropped, [image_size, image_size, 3])
        return example | {"image": cropped, "code": code}

    return examples.map(
        make_crop, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )


def _readable(source, unreadable):
    """Returns a function that is True for readable examples.

    It reports the other examples to `unreadable`.
    """

    def readable(example):
        def report():
            noted = unreadable.report_op(
                example["name"][None],
                example["code"][None],
                source=source,
                seen=example["counter"] + 1,
                lost=tf.constant(False),
            )
            with tf.control_dependencies([noted]):
                return tf.constant(False)

        return tf.cond(example["code"] == headers.OK, lambda: True, report)

    return readable
