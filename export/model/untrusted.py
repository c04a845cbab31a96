"""Checks of untrusted images inside the graph, before expensive operations.

The graph reads the header of a file first (`clsa_tf.data.headers`) and decodes
only files within the limits.
"""

import typing

import tensorflow as tf

from clsa_tf.augment import crop
from clsa_tf.data import decode, headers

# Continue the codes of `headers`.
_INFINITE, _RANGE = headers.AVIF + 1, headers.AVIF + 2


class Limits(typing.NamedTuple):
    """Limits of a request.

    Attributes:
        image_bytes: bytes of an encoded image.
        image_pixels: pixels of an encoded image, height times width.
        batch_images: images in a request. For images that are not encoded, the
            limit is the number of pixels of this many images of the encoder's
            own size.
    """

    image_bytes: int = headers.MAX_IMAGE_BYTES
    image_pixels: int = headers.MAX_IMAGE_PIXELS
    batch_images: int = 256


DEFAULT = Limits()


def prepare(image_bytes, *, size, crop_ratio, limits):
    """Decodes, resizes and crops `[N]` untrusted files.

    The EXIF orientation is not applied.

    Args:
        image_bytes: string `[N]`.
        size: S, side of the result in px.
        crop_ratio: share of the short side within the centre crop, in (0, 1].
        limits: `Limits`.

    Returns:
        uint8 `[N, S, S, 3]`, black where an image is bad, and int32 `[N]`, 0
        where it is good; see `reasons`.
    """
    rules = headers.Rules(
        limits.image_bytes, limits.image_pixels, exif_rotation=False
    )

    def examine(encoded):
        code, image = decode.try_decode(encoded, rules)
        image = crop.central(image, size=size, crop_ratio=crop_ratio)
        return tf.ensure_shape(image, [size, size, 3]), code

    return tf.map_fn(
        examine,
        image_bytes,
        fn_output_signature=(
            tf.TensorSpec([size, size, 3], tf.uint8),
            tf.TensorSpec([], tf.int32),
        ),
        parallel_iterations=16,
    )


def check_values(images):
    """Finds images with values outside of [0, 1].

    Args:
        images: float32 `[N, H, W, 3]`, any values.

    Returns:
        float32 `[N, H, W, 3]`, zero where an image is bad, and int32 `[N]`, 0
        where it is good; see `reasons`.
    """
    axes = [1, 2, 3]
    finite = tf.reduce_all(tf.math.is_finite(images), axes)
    # Tolerates rounding errors.
    inside = tf.reduce_all(tf.abs(images - 0.5) <= 0.5 + 1e-3, axes)
    reason = tf.where(inside, headers.OK, _RANGE)
    reason = tf.where(finite, reason, _INFINITE)
    good = (reason == headers.OK)[:, tf.newaxis, tf.newaxis, tf.newaxis]
    return tf.where(good, images, 0.0), reason


def reasons(limits):
    """Returns the text for each code of `prepare` and `check_values`."""
    return headers.reasons(limits) | {
        _INFINITE: "has values that are not finite",
        _RANGE: (
            "has values outside of 0 to 1: divide 8-bit values by 255, or use "
            "the signature images_uint8"
        ),
    }
