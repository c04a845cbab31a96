"""The rotation that EXIF data of a JPEG ask for, in a graph.

Cameras store the pixels as the sensor has them, and note in one of eight
numbers how the photograph was held: 1 is upright, 6 and 8 are quarter turns.
"""

import tensorflow as tf

_TAG = 0x0112
_SHORT = 3
# Segments before the EXIF data that are passed over, at most.
_MAX_SEGMENTS = 32


def of_jpeg(encoded) -> tf.Tensor:
    """Reads the orientation of a JPEG.

    Args:
        encoded: string[], the contents of the file.

    Returns:
        i32[] in 1..8; 1 if there are no EXIF data, or damaged ones.

    Source: JEITA CP-3451, 4.6.2 and 4.6.4 A; as Pillow the first segment.
    """

    def segment(position, marker):
        """The next segment, if it may come before EXIF data."""
        length = _number(encoded, position + 2, 2, big=True)
        position += 2 + tf.maximum(length, 2)
        return position, _number(encoded, position, 2, big=True)

    def is_other(position, marker):
        application = (marker >= 0xFFE0) & (marker <= 0xFFEF)
        return (application | (marker == 0xFFFE)) & ~_is_exif(
            encoded, position, marker
        )

    first = tf.constant(2)
    position, marker = tf.while_loop(
        is_other,
        segment,
        (first, _number(encoded, first, 2, big=True)),
        parallel_iterations=1,
        maximum_iterations=_MAX_SEGMENTS,
    )
    return tf.cond(
        _is_exif(encoded, position, marker),
        lambda: _of_exif(encoded, position + 10),
        lambda: 1,
    )


def _is_exif(encoded, position, marker):
    words = _substr(encoded, position + 4, 6) == b"Exif\0\0"
    return (marker == 0xFFE1) & words


def _of_exif(encoded, begin):
    """The orientation that a TIFF header at `begin` leads to."""
    big = _substr(encoded, begin, 4) == b"MM\0*"
    known = big | (_substr(encoded, begin, 4) == b"II*\0")
    table = begin + _number(encoded, begin + 4, 4, big=big)
    count = _number(encoded, table, 2, big=big)
    entries = _substr(encoded, table + 2, 12 * count)
    whole = tf.strings.length(entries) // 12
    entries = tf.strings.substr(entries, 0, 12 * whole)
    numbers = _decode(entries, tf.uint16, big)  # tag, kind, …, …, value, …
    numbers = tf.cast(tf.reshape(numbers, [-1, 6]), tf.int32)
    found = (numbers[:, 0] == _TAG) & (numbers[:, 1] == _SHORT)
    values = tf.boolean_mask(numbers[:, 4], found)
    value = tf.concat([values, [1]], axis=0)[0]
    return tf.where(known & (value >= 1) & (value <= 8), value, 1)


def _substr(encoded, position, length):
    """Like `tf.strings.substr`, but past the end there is nothing."""
    size = tf.strings.length(encoded)
    # Offsets in damaged files may be negative as well.
    position = tf.where((position < 0) | (position > size), size, position)
    return tf.strings.substr(encoded, position, length)


def _number(encoded, position, width, *, big):
    """An unsigned number of 2 bytes, or a signed one of 4; 0 past the end."""
    raw = _substr(encoded, position, width) + b"\0" * width
    raw = tf.strings.substr(raw, 0, width)
    dtype = tf.uint16 if width == 2 else tf.int32
    return tf.cast(_decode(raw, dtype, big)[0], tf.int32)


def _decode(raw, dtype, big):
    if isinstance(big, bool):
        return tf.io.decode_raw(raw, dtype, little_endian=not big)
    return tf.cond(
        big,
        lambda: tf.io.decode_raw(raw, dtype, little_endian=False),
        lambda: tf.io.decode_raw(raw, dtype),
    )


def _parts(orientation):
    """Whether to transpose, then to mirror columns, then to mirror rows."""
    transpose = orientation >= 5
    columns, rows = (
        tf.reduce_any(orientation == numbers)
        for numbers in ([2, 3, 6, 7], [3, 4, 7, 8])
    )
    return transpose, columns, rows


def upright(image, orientation) -> tf.Tensor:
    """Turns pixels as stored, u8[H, W, 3], upright.

    Args:
        image: u8[H, W, 3].
        orientation: i32[] in 1..8.

    Returns:
        u8[H, W, 3] or u8[W, H, 3].

    Source: equal to Pillow's `ImageOps.exif_transpose`.
    """

    def turned():
        transpose, columns, rows = _parts(orientation)
        order = tf.where(transpose, [1, 0, 2], [0, 1, 2])
        result = tf.transpose(image, order)
        steps = tf.where(tf.stack([rows, columns]), -1, 1)
        result = tf.reverse(result, tf.where(steps < 0)[:, 0])
        return tf.ensure_shape(result, [None, None, 3])

    return tf.cond(orientation == 1, lambda: image, turned)


def upright_size(size, orientation) -> tf.Tensor:
    """Height and width [2] that an image of `size` [2] has once upright."""
    return tf.where(orientation >= 5, size[::-1], size)


def stored_boxes(boxes, size, orientation) -> tf.Tensor:
    """Where boxes of the upright image lie in the image as stored.

    Args:
        boxes: [V, 4], rows (top, left, height, width) in pixels.
        size: [2], height and width of the upright image, of the same dtype.
        orientation: i32[] in 1..8.

    Returns:
        [V, 4], boxes as above.
    """
    transpose, columns, rows = _parts(orientation)
    boxes = _mirrored(boxes, size, rows, columns)
    return tf.where(transpose, _transposed(boxes), boxes)


def upright_boxes(boxes, size, orientation) -> tf.Tensor:
    """The inverse of `stored_boxes`; `size` is that of the stored image."""
    transpose, columns, rows = _parts(orientation)
    boxes = tf.where(transpose, _transposed(boxes), boxes)
    size = upright_size(size, orientation)
    return _mirrored(boxes, size, rows, columns)


def _mirrored(boxes, size, rows, columns):
    corners, sizes = boxes[:, :2], boxes[:, 2:]
    mirror = tf.stack([rows, columns])  # [2]
    corners = tf.where(mirror, size - corners - sizes, corners)
    return tf.concat([corners, sizes], axis=1)


def _transposed(boxes):
    return tf.gather(boxes, [1, 0, 3, 2], axis=1)
