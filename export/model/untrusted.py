"""Images from strangers, within a graph: refused before they cost anything.

A file of a few kB can claim 900 million pixels, thousands of scans or frames.
What a file claims is read from its header first, and only what keeps within
the limits is decoded.
"""

import typing

import tensorflow as tf

from clsa_tf.augment import crop
from clsa_tf.data import decode

# A pixel of a JPEG is worked on once per scan; progressive files have about
# ten scans.
_MAX_SCANS = 20
# The largest side that a JPEG can have; resizing computes with 32 bits.
_MAX_SIDE = 65_535

_OK, _UNKNOWN, _BYTES, _PIXELS, _DAMAGED, _INFINITE, _RANGE = range(7)


class Limits(typing.NamedTuple):
    """What a request may ask for.

    Attributes:
        image_bytes: of an encoded image.
        image_pixels: of an encoded image, height times width.
        batch_images: images in a request; of images that are not encoded,
            that many times the size of the encoder's own pixels.
    """

    image_bytes: int = 20_000_000
    image_pixels: int = 50_000_000
    batch_images: int = 256


DEFAULT = Limits()


def prepare(image_bytes, *, size, keep, limits):
    """Decodes, resizes and crops; `[N]` files that may be anything.

    Args:
        image_bytes: string `[N]`.
        size: S, side of the result in px.
        keep: share of the short side that the centre crop keeps, in (0, 1].
        limits: `Limits`.

    Returns:
        uint8 `[N, S, S, 3]`, black where an image is bad, and int32 `[N]`, 0
        where it is good; see `reasons`.
    """
    black = tf.zeros([size, size, 3], tf.uint8)

    def read(encoded):
        encoded = _first_frame(encoded)
        height, width = _size(encoded)
        pixels = height * width
        work = pixels * _scans(encoded)
        fits = (
            (tf.maximum(height, width) <= _MAX_SIDE)
            & (pixels <= limits.image_pixels)
            & (work <= _MAX_SCANS * limits.image_pixels)
        )
        return tf.cond(
            fits,
            lambda: (
                crop.central(decode.decode(encoded), size=size, keep=keep),
                _OK,
            ),
            lambda: (black, _PIXELS),
        )

    def examine(encoded):
        small = tf.strings.length(encoded) <= limits.image_bytes

        def attempt():
            _, result = decode.attempt(
                read, encoded, otherwise=(black, _DAMAGED)
            )
            return result

        image, reason = tf.cond(
            small & _is_known(encoded),
            attempt,
            lambda: (black, tf.where(small, _UNKNOWN, _BYTES)),
        )
        return tf.ensure_shape(image, black.shape), reason

    return tf.map_fn(
        examine,
        image_bytes,
        fn_output_signature=(
            tf.TensorSpec(black.shape, tf.uint8),
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
    reason = tf.where(inside, _OK, _RANGE)
    reason = tf.where(finite, reason, _INFINITE)
    good = (reason == _OK)[:, tf.newaxis, tf.newaxis, tf.newaxis]
    return tf.where(good, images, 0.0), reason


def reasons(limits):
    """What the numbers of `prepare` and `check_values` mean, in words."""
    return {
        _OK: "is good",
        _UNKNOWN: "is not a JPEG, PNG, BMP or GIF file",
        _BYTES: f"has more than {limits.image_bytes} bytes",
        _PIXELS: (
            f"has more than {limits.image_pixels} pixels, {_MAX_SIDE} in a "
            "row or column, or far more scans than photographs have"
        ),
        _DAMAGED: "is damaged or truncated",
        _INFINITE: "has values that are not finite",
        _RANGE: (
            "has values outside of 0 to 1: divide 8-bit values by 255, or use "
            "the signature images_uint8"
        ),
    }


def _starts(encoded, magic):
    return tf.strings.substr(encoded, 0, len(magic)) == magic


def _is_known(encoded):
    # What TensorFlow's decoders go by.
    return (
        _starts(encoded, b"\xff\xd8\xff")
        | _starts(encoded, b"\x89PNG\r\n\x1a\n")
        | _starts(encoded, b"BM")
        | _starts(encoded, b"GIF8")
    )


def _size(encoded):
    """Height and width, int64[], from the header; may fail, may be wrong."""

    def field(position, dtype, *, little_endian=True):
        raw = tf.strings.substr(encoded, position, 2 * dtype.size)
        values = tf.io.decode_raw(raw, dtype, little_endian=little_endian)
        # A header that ends too early fails here.
        width, height = tf.unstack(tf.ensure_shape(values, [2]))
        # The height of a BMP that is stored top down is negative.
        return tf.stack([abs(tf.cast(x, tf.int64)) for x in (height, width)])

    def jpeg():
        return tf.cast(tf.image.extract_jpeg_shape(encoded)[:2], tf.int64)

    height, width = tf.unstack(
        tf.case(
            [
                (_starts(encoded, b"\xff\xd8"), jpeg),
                (
                    _starts(encoded, b"\x89"),
                    lambda: field(16, tf.int32, little_endian=False),
                ),
                (_starts(encoded, b"BM"), lambda: field(18, tf.int32)),
            ],
            # The screen of a GIF need not be that of its frame.
            default=lambda: _frame_size(encoded),
        ),
        num=2,
    )
    return height, width


def _scans(encoded):
    """How often a decoder goes over the pixels, int64[]."""

    def count():
        values = tf.io.decode_raw(encoded, tf.uint8)
        marks = (values[:-1] == 0xFF) & (values[1:] == 0xDA)
        return tf.math.count_nonzero(marks)

    is_jpeg = _starts(encoded, b"\xff\xd8")
    return tf.cond(is_jpeg, count, lambda: tf.constant(1, tf.int64))


# --- GIF --------------------------------------------------------------------
# TensorFlow's decoder unpacks all frames, of which it is asked for the first.


def _byte(encoded, position):
    raw = tf.strings.substr(encoded, position, 1)
    return tf.cast(tf.io.decode_raw(raw, tf.uint8)[0], tf.int32)


def _after_table(encoded, flags_at, begin):
    """Where a colour table ends that starts at `begin`, if there is one."""
    flags = _byte(encoded, flags_at)
    entries = tf.bitwise.left_shift(2, tf.bitwise.bitwise_and(flags, 7))
    return begin + tf.where(flags >= 128, 3 * entries, 0)


def _after_blocks(encoded, begin):
    """Where a chain of data blocks ends; each says its length first."""

    def follow(position, _):
        length = _byte(encoded, position)
        return position + 1 + length, length > 0

    return tf.while_loop(
        lambda _, more: more, follow, (begin, True), parallel_iterations=1
    )[0]


def _frame_at(encoded):
    """Where the description of the first frame begins."""
    begin = _after_table(encoded, 10, 13)
    return tf.while_loop(
        lambda position: _byte(encoded, position) == 0x21,  # an extension
        lambda position: (_after_blocks(encoded, position + 2),),
        (begin,),
        parallel_iterations=1,
    )[0]


def _frame_size(encoded):
    raw = tf.strings.substr(encoded, _frame_at(encoded) + 5, 4)
    width, height = tf.unstack(
        tf.ensure_shape(tf.io.decode_raw(raw, tf.uint16), [2])
    )
    return tf.cast(tf.stack([height, width]), tf.int64)


def _first_frame(encoded):
    """A GIF without all but its first frame; other files as they are."""

    def cut():
        frame = _frame_at(encoded)
        data = _after_table(encoded, frame + 9, frame + 10) + 1
        end = _after_blocks(encoded, data)
        return tf.strings.substr(encoded, 0, end) + b";"

    return tf.cond(_starts(encoded, b"GIF8"), cut, lambda: encoded)
