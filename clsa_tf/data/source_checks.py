"""Checks of a source before training begins."""

from typing import Sequence

import numpy as np
import tensorflow as tf

from clsa_tf.augment.views import View
from clsa_tf.data import headers
from clsa_tf.data.decode import try_decode
from clsa_tf.data.shapes.render import SIDE
from clsa_tf.data.source import Source
from clsa_tf.errors import UserError


def check_sizes(
    source: Source,
    views: Sequence[View],
    *,
    allow_upscaling: bool,
    samples: int = 64,
) -> None:
    """Checks that images can be decoded and are not smaller than the crops.

    Args:
        source: where the images come from.
        views: the views to make of each image.
        allow_upscaling: whether crops may be larger than the images.
        samples: number of images to check. They are drawn at random if the
            source has random access, and otherwise taken from the beginning of
            its files.

    Raises:
        UserError: none of the samples can be decoded, or the largest crop is
            larger than the longer side of more than half of them.
    """
    sizes, bad = _sizes(source, samples)
    if not len(sizes):
        raise UserError(
            f"Expected images in {source.name}, received "
            f"{min(samples, source.size)} samples that cannot be decoded, "
            f"such as {bad}; check the files."
        )
    _check_crops(sizes, source.name, views, allow_upscaling)


def check_drawn_sizes(dataset, views, *, allow_upscaling):
    """Checks the image sizes of a dataset before it is rendered.

    Args:
        dataset: value of `--dataset`. The sizes of `shapes` are known, and
            other datasets are not checked.
        views: see `check_sizes`.
        allow_upscaling: see `check_sizes`.

    Raises:
        UserError: see `check_sizes`.
    """
    if dataset == "shapes":
        sizes = np.array([[SIDE, SIDE]])
        _check_crops(
            sizes,
            dataset,
            views,
            allow_upscaling,
            "start from --flagfile=quickstart, ",
        )


def check_batch_size(source, batch_size):
    """Raises `UserError` if a batch is larger than the dataset.

    Args:
        source: where the images come from.
        batch_size: number of images in a global batch.
    """
    if batch_size > source.size:
        raise UserError(
            f"Expected a batch of at most {source.size} images, the size of "
            f"{source.name}, received --batch_size={batch_size}; lower "
            "--batch_size or add images."
        )


def check_readable_elsewhere(source, where, advice):
    """Raises `UserError` for a source that only this process can read.

    Args:
        source: where the images come from.
        where: where other processes would read it, for the message.
        advice: an alternative, in the imperative.
    """
    if source.local:
        raise UserError(
            f"Expected files that TensorFlow reads by itself {where}, received "
            f"{source.name}, {source.local} {advice}."
        )


def _check_crops(sizes, name, views, allow_upscaling, advice=""):
    """Raises `UserError` if crops are larger than most of `sizes` [n, 2]."""
    largest = max(view.size for view in views)
    small = np.max(sizes, axis=1) < largest
    if np.mean(small) > 0.5 and not allow_upscaling:
        height, width = np.median(sizes, axis=0).astype(int)
        raise UserError(
            f"Expected images of at least {largest} px, the largest crop, "
            f"received in {name} a median size of {width}x{height} px; "
            f"{advice}choose smaller crops or pass --allow_upscaling."
        )


@tf.autograph.experimental.do_not_convert  # see training_batches
def _sizes(source, samples):
    """Decodes samples to find their sizes.

    Returns:
        (height and width [n, 2] of the samples that can be decoded; name of
        the last other sample with the reason, or "").
    """

    def size(example):
        code, image = try_decode(
            example["bytes"], source.rules, code=example["code"]
        )
        return code, tf.shape(image)[:2], example["name"]

    examples = source.examples(
        start=0, seed=0, shuffle=source.random_access, repeat=False
    )
    found = examples.take(samples).map(
        size, num_parallel_calls=tf.data.AUTOTUNE
    )
    sizes, bad = [], ""
    words = headers.reasons(source.rules)
    for code, shape, name in found.as_numpy_iterator():
        if code == headers.OK:
            sizes.append(shape)
        else:
            bad = f"{name.decode('utf-8', 'replace')}, which {words[code]}"
    return np.array(sizes), bad
