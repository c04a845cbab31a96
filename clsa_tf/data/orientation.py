"""Applies the EXIF orientation of a JPEG, in a graph.

Cameras store the pixels as the sensor delivers them. One of eight numbers
records how the camera was held: 1 is upright, 6 and 8 are quarter turns.
"""

import tensorflow as tf

from clsa_tf.data.graph_calls import opaque

_TAG = 0x0112
_SHORT = 3
# EXIF data that start after this position are not found. They are in one of the
# first segments, of at most 64 KiB each.
_SEARCHED = 2**17  # bytes
_MOST_SEGMENTS = 32
_MOST_ENTRIES = 128


@opaque
def of_files(files) -> tf.Tensor:
    """Reads the orientations of JPEGs.

    Args:
        files: list of K string[], the contents. Other kinds count as upright.

    Returns:
        i32[K] in 1..8; 1 if the EXIF data are missing or damaged.

    Source: JEITA CP-3451, 4.6.2 and 4.6.4 A. As in Pillow, the first segment
    with EXIF data counts.
    """
    # All files at once, because small operations are mostly overhead.
    heads = tf.stack([tf.strings.substr(x, 0, _SEARCHED) for x in files])

    def is_exif(position, marker):
        words = _substr(heads, position + 4, 6)
        return (marker == 0xFFE1) & (words == b"Exif\0\0")

    def is_other(position, marker):
        """Returns whether the segment may come before EXIF data."""
        application = (marker >= 0xFFE0) & (marker <= 0xFFEF)
        before = application | (marker == 0xFFFE)
        return before & ~is_exif(position, marker)

    def following(position, marker):
        length = tf.maximum(_number(heads, position + 2, 2, True), 2)
        step = tf.where(is_other(position, marker), 2 + length, 0)
        return position + step, _number(heads, position + step, 2, True)

    is_jpeg = _substr(heads, tf.zeros([len(files)], tf.int32), 2) == b"\xff\xd8"
    begin = tf.where(is_jpeg, 2, _SEARCHED)
    position, marker = tf.while_loop(
        lambda *segment: tf.reduce_any(is_other(*segment)),
        following,
        (begin, _number(heads, begin, 2, True)),
        parallel_iterations=1,
        maximum_iterations=_MOST_SEGMENTS,
    )
    found = _of_exif(heads, position + 10)
    return tf.where(is_exif(position, marker), found, 1)


def _of_exif(heads, begin):
    """Returns the orientations [K] from the TIFF headers at `begin` [K]."""
    order = _substr(heads, begin, 4)
    big = order == b"MM\0*"
    known = big | (order == b"II*\0")
    table = begin + _number(heads, begin + 4, 4, big)
    count = _number(heads, table, 2, big)
    entries = _bytes(heads, table + 2, 12 * _MOST_ENTRIES)
    pairs = tf.reshape(entries, [-1, _MOST_ENTRIES, 6, 2])
    swap = big[:, tf.newaxis, tf.newaxis, tf.newaxis]
    pairs = tf.where(swap, pairs, pairs[..., ::-1])
    # Tag, type, …, …, value, …
    numbers = 256 * pairs[..., 0] + pairs[..., 1]  # [K, entries, 6]
    tags, types, values = (numbers[..., i] for i in (0, 1, 4))
    found = (tags == _TAG) & (types == _SHORT)
    found &= tf.range(_MOST_ENTRIES) < count[:, tf.newaxis]
    first = tf.argmax(found, axis=1)
    value = tf.gather(values, first, batch_dims=1)
    known &= tf.reduce_any(found, axis=1) & (value >= 1) & (value <= 8)
    return tf.where(known, value, 1)


def _substr(heads, position, length):
    """Like `tf.strings.substr`, but returns "" past the end."""
    sizes = tf.strings.length(heads)
    # Offsets in damaged files may be negative as well.
    outside = (position < 0) | (position > sizes)
    position = tf.where(outside, sizes, position)
    return tf.strings.substr(heads, position, tf.fill(tf.shape(sizes), length))


def _bytes(heads, position, length):
    """Returns the bytes at positions [K], i32[K, length]; 0 past the end."""
    found = tf.io.decode_raw(
        tf.strings.join([_substr(heads, position, length), b"\0" * length]),
        tf.uint8,
        fixed_length=length,
    )
    return tf.cast(found, tf.int32)


def _number(heads, position, width, big):
    """Returns the numbers of `width` <= 4 bytes at positions [K], i32[K]."""
    digits = _bytes(heads, position, width)
    big = tf.reshape(big, [-1, 1])
    digits = tf.where(big, digits, digits[:, ::-1])
    return tf.reduce_sum(
        digits * [256**i for i in reversed(range(width))], axis=1
    )


def _parts(orientation):
    """Returns whether to transpose, then mirror columns, then mirror rows."""
    transpose = orientation >= 5
    columns, rows = (
        tf.reduce_any(orientation == numbers)
        for numbers in ([2, 3, 6, 7], [3, 4, 7, 8])
    )
    return transpose, columns, rows


@opaque
def upright(image, orientation) -> tf.Tensor:
    """Rotates the stored pixels upright.

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
    """Returns the upright height and width [2] of an image of `size` [2]."""
    return tf.where(orientation >= 5, size[::-1], size)


def stored_boxes(boxes, size, orientation) -> tf.Tensor:
    """Converts boxes of the upright image to boxes of the stored image.

    Args:
        boxes: [V, 4], rows (top, left, height, width) in pixels.
        size: [2], height and width of the upright image, of the same dtype.
        orientation: i32[] in 1..8.

    Returns:
        [V, 4], boxes in the same form.
    """
    transpose, columns, rows = _parts(orientation)
    boxes = _mirrored(boxes, size, rows, columns)
    return tf.where(transpose, _transposed(boxes), boxes)


def upright_boxes(boxes, size, orientation) -> tf.Tensor:
    """Inverts `stored_boxes`; `size` is the size of the stored image."""
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
