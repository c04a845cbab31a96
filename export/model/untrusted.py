"""Images from strangers, within a graph: refused before they cost anything.

What a file claims is read from its header first (`clsa_tf.data.headers`), and
only what keeps within the limits is decoded.
"""

import typing

import tensorflow as tf

from clsa_tf.augment import crop
from clsa_tf.data import decode, headers

# Behind the codes of `headers`.
_INFINITE, _RANGE = headers.AVIF + 1, headers.AVIF + 2


class Limits(typing.NamedTuple):
    """What a request may ask for.

    Attributes:
        image_bytes: of an encoded image.
        image_pixels: of an encoded image, height times width.
        batch_images: images in a request; of images that are not encoded,
            that many times the size of the encoder's own pixels.
    """

    image_bytes: int = headers.MAX_IMAGE_BYTES
    image_pixels: int = headers.MAX_IMAGE_PIXELS
    batch_images: int = 256


DEFAULT = Limits()


def prepare(image_bytes, *, size, keep, limits):
    """Decodes, resizes and crops; `[N]` files that may be anything.

    A rotation noted in EXIF data is not applied.

    Args:
        image_bytes: string `[N]`.
        size: S, side of the result in px.
        keep: share of the short side that the centre crop keeps, in (0, 1].
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
        image = crop.central(image, size=size, crop_ratio=keep)
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
    """Looks for what cannot be an image.

    Args:
        images: float32 `[N, H, W, 3]`, anything.

    Returns:
        float32 `[N, H, W, 3]`, zero where an image is bad, and int32 `[N]`, 0
        where it is good; see `reasons`.
    """
    axes = [1, 2, 3]
    finite = tf.reduce_all(tf.math.is_finite(images), axes)
    # Arithmetic may leave the range by a rounding.
    inside = tf.reduce_all(tf.abs(images - 0.5) <= 0.5 + 1e-3, axes)
    reason = tf.where(inside, headers.OK, _RANGE)
    reason = tf.where(finite, reason, _INFINITE)
    good = (reason == headers.OK)[:, tf.newaxis, tf.newaxis, tf.newaxis]
    return tf.where(good, images, 0.0), reason


def reasons(limits):
    """What the numbers of `prepare` and `check_values` mean, in words."""
    return headers.reasons(limits) | {
        _INFINITE: "has values that are not finite",
        _RANGE: (
            "has values outside of 0 to 1: divide 8-bit values by 255, or use "
            "the signature images_uint8"
        ),
    }
