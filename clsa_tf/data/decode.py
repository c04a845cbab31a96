"""Decodes image files, and handles files that cannot be decoded.

`decode` returns the whole image. `open_image` followed by `decode_boxes` does
only the work needed for a set of crops. The functions whose names start with
`try_` apply `headers.Rules`, and return a code of `headers` as the reason why
an image is unreadable.
"""

import functools
from typing import Any, NamedTuple

import tensorflow as tf

from clsa_tf.data import headers, orientation
from clsa_tf.data.graph_calls import attempt, opaque

_REDUCTIONS = (1, 2, 4, 8)  # factors by which libjpeg can reduce the size
# Pixels that a reduction must leave per pixel of the result, in each
# direction. Pillow has the same default (`reducing_gap` of `thumbnail`).
_GAP = 2
# Smallest shorter side of an image that can be reduced at all, as a multiple of
# the largest square.
REDUCIBLE = _GAP * _REDUCTIONS[1]
# The accurate transform is the default of libjpeg and Pillow, and it costs no
# more. TensorFlow's default is the fast transform.
_DCT_METHOD = "INTEGER_ACCURATE"
# JPEG stores colours at a lower resolution and interpolates them. At the border
# of a window one neighbour is missing.
_MARGIN = 1  # pixels


class Opened(NamedTuple):
    """An image file of known size, whose pixels may not be decoded yet.

    Attributes:
        encoded: string[], the contents of the file.
        size: i32[2], height and width in pixels, upright.
        pixels: u8[H, W, 3] as from `decode`, or u8[0, 0, 3] for a large JPEG.
        code: i32[], `headers.OK`, or the reason why there are no pixels. In
            that case `pixels` is one black pixel.
        turn: i32[], the EXIF orientation to apply to the JPEG, see
            `orientation`; 1 for none.
    """

    encoded: tf.Tensor
    size: tf.Tensor
    pixels: tf.Tensor
    code: Any = headers.OK
    turn: Any = 1


def decode(encoded) -> tf.Tensor:
    """Decodes a JPEG, PNG, BMP or GIF image, whatever its size.

    Grey images get three equal channels. Palettes and CMYK become RGB. An
    animation yields its first frame. 16-bit PNGs keep the high byte. Alpha is
    dropped without blending, as by Pillow's `convert("RGB")`. The rotation in
    EXIF data is not applied, as in published pipelines; see `try_decode`.

    Args:
        encoded: string[], the contents of the file.

    Returns:
        u8[H, W, 3], RGB.

    Raises:
        tf.errors.InvalidArgumentError: `encoded` has none of these formats, or
            is damaged or truncated.

    Source: equal to Pillow's decoders, with two exceptions. Pillow clips 16-bit
    PNGs. In GIFs, transparent pixels are black here, and a first frame that is
    smaller than the canvas is not placed on it.
    """
    return tf.cond(
        _is_jpeg(encoded),
        lambda: _decode_jpeg(encoded),
        lambda: _decode_other(encoded),
    )  # [H, W, 3]


def open_image(encoded, *, whole_below=0) -> Opened:
    """Finds the size of an image, and decodes it unless it is a large JPEG.

    Args:
        encoded: string[], the contents of the file.
        whole_below: a JPEG whose shorter side is less than this, in pixels, is
            decoded, too. For small images a second pass costs more than
            `decode_boxes` saves.

    Returns:
        `Opened` for `decode_boxes`, not rotated. The size of a JPEG is taken
        from its header.

    Raises:
        tf.errors.InvalidArgumentError: as `decode`, except for damage after
            the header of a large JPEG, which `decode_boxes` finds.
    """

    def jpeg():
        size = tf.image.extract_jpeg_shape(encoded)[:2]
        return _open_jpeg(encoded, size, whole_below)

    return tf.cond(
        _is_jpeg(encoded),
        jpeg,
        lambda: _opened(encoded, _decode_other(encoded)),
    )


def _open_jpeg(encoded, size, whole_below):
    size = tf.ensure_shape(size, [2])
    pixels = tf.cond(
        tf.reduce_min(size) < whole_below,
        lambda: _decode_jpeg(encoded),
        lambda: tf.zeros([0, 0, 3], tf.uint8),
    )
    pixels = tf.ensure_shape(pixels, [None, None, 3])
    return Opened(encoded, size, pixels, tf.constant(headers.OK))


def _opened(encoded, pixels):
    """Returns the `Opened` of a decoded image."""
    pixels = tf.ensure_shape(pixels, [None, None, 3])
    return Opened(
        encoded, tf.shape(pixels)[:2], pixels, tf.constant(headers.OK)
    )


def decode_boxes(opened, boxes, *, sizes):
    """Decodes the pixels needed to resize rectangles of an image to squares.

    Of a large JPEG only the window that holds all boxes is decoded. It is
    reduced by the largest r of 8, 4, 2 and 1 that leaves every box at least
    twice as many pixels as its square, in height and in width. The returned
    boxes are in pixels of the decoded window. Other images are already decoded.

    With r = 1 the pixels in the boxes equal those of `decode`. With r > 1 a
    pixel is about the mean of r x r pixels (DCT scaling). Antialiased squares
    of photographs then differ from those of the full image by 1/255 on
    average for boxes just large enough for r, and by less for larger boxes.

    Damage below the boxes is not detected. However, a JPEG without the usual
    end marker is read to its last row, so a truncated file is an error.

    Args:
        opened: an `Opened`.
        boxes: i32[V, 4], rows (top, left, height, width) in pixels of the
            full image, inside it.
        sizes: V ints, sides of the squares in pixels.

    Returns:
        (image u8[H, W, 3], boxes f32[V, 4]). Each box lies inside the image.

    Raises:
        tf.errors.InvalidArgumentError: the JPEG is damaged or truncated.

    Source: libjpeg, as used by Pillow's `Image.draft`; the pixels are equal.
    """
    boxes = tf.ensure_shape(tf.convert_to_tensor(boxes), [len(sizes), 4])
    turn = tf.convert_to_tensor(opened.turn)
    stored = orientation.stored_boxes(boxes, opened.size, turn)
    stored_size = orientation.upright_size(opened.size, turn)
    allowed = tf.reduce_min(
        boxes[:, 2:] // (_GAP * tf.constant(sizes)[:, None])
    )
    choice = tf.reduce_sum(tf.cast(allowed >= _REDUCTIONS[1:], tf.int32))
    windows = [
        lambda r=r: _decode_window(
            opened.encoded, stored_size, stored, reduction=r
        )
        for r in _REDUCTIONS
    ]

    def window():
        """Decodes the window as stored, then rotates it."""
        image, inside = tf.switch_case(choice, windows)
        size = tf.cast(tf.shape(image)[:2], tf.float32)
        inside = orientation.upright_boxes(inside, size, turn)
        return orientation.upright(image, turn), inside

    image, boxes = tf.cond(
        _is_decoded(opened),
        lambda: (opened.pixels, tf.cast(boxes, tf.float32)),
        window,
    )
    return tf.ensure_shape(image, [None, None, 3]), boxes


def _is_jpeg(encoded):
    return tf.strings.substr(encoded, 0, 2) == b"\xff\xd8"


def _is_decoded(opened):
    return tf.size(opened.pixels) > 0


def _decode_jpeg(encoded):
    return tf.io.decode_jpeg(encoded, channels=3, dct_method=_DCT_METHOD)


def _decode_window(encoded, size, boxes, *, reduction):
    """Decodes the window that holds the boxes.

    A window never takes longer than the whole image. The decoder does not read
    the rows below it (except in progressive files), and transforms only its
    pixels.

    Returns:
        (window u8[h, w, 3], boxes f32[V, 4] in pixels of the window).
    """
    r = reduction
    size = (size + r - 1) // r  # [2], rounded as in libjpeg
    begin, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]  # [V, 2]
    first = tf.reduce_min(begin // r, axis=0) - _MARGIN  # [2]
    last = tf.reduce_max((end + r - 1) // r, axis=0) + _MARGIN  # [2]
    first, last = tf.maximum(first, 0), tf.minimum(last, size)
    is_complete = tf.strings.substr(encoded, -2, 2) == b"\xff\xd9"
    last = tf.where(is_complete, last, size)
    image = tf.io.decode_and_crop_jpeg(
        encoded,
        tf.concat([first, last - first], axis=0),
        channels=3,
        ratio=r,
        dct_method=_DCT_METHOD,
    )
    corner = tf.cast(tf.concat([first, [0, 0]], axis=0), tf.float32)
    return image, tf.cast(boxes, tf.float32) / r - corner


def _decode_other(encoded):
    return tf.cond(
        tf.strings.substr(encoded, 0, 2) == b"BM",
        lambda: _decode_bmp(encoded),
        lambda: _decode_png(encoded),
    )


def _decode_png(encoded):
    """Decodes a PNG, or the first frame of a GIF."""
    return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def _decode_bmp(encoded):
    pixels = tf.io.decode_bmp(encoded)  # [H, W, 1, 3 or 4]
    return tf.cond(
        tf.shape(pixels)[2] == 1,
        lambda: _apply_palette(encoded, pixels[:, :, 0]),
        lambda: pixels[:, :, :3],
    )


def _apply_palette(encoded, indices):
    """Looks up 8-bit BMP pixels, which `decode_bmp` returns as grey values."""
    header = tf.io.decode_raw(tf.strings.substr(encoded, 10, 8), tf.int32)
    end, begin = header[0], 14 + header[1]
    palette = tf.io.decode_raw(
        tf.strings.substr(encoded, begin, end - begin), tf.uint8
    )
    palette = tf.reshape(palette, [-1, 4])[:, 2::-1]  # BGR0 -> RGB [C, 3]
    return tf.gather(palette, tf.cast(indices, tf.int32))  # [H, W, 3]


def try_decode(encoded, rules, *, code=headers.OK):
    """Decodes an image; returns a code instead of failing.

    Args:
        encoded: string[], the contents of the file.
        rules: `headers.Rules`. With `exif_rotation`, a JPEG is rotated as its
            EXIF data specify. A PNG with EXIF data is not, because programs
            disagree about it.
        code: i32[], `headers.OK`, or the reason why there are no contents.

    Returns:
        (code i32[], image u8[H, W, 3]). The code is `headers.OK` if the image
        was decoded; otherwise the image is one black pixel.
    """

    _, (code, image) = attempt(
        functools.partial(_read, rules=rules),
        (encoded, tf.convert_to_tensor(code)),
        otherwise=(headers.DAMAGED, _black()),
    )
    if rules.exif_rotation:
        image = orientation.upright(image, orientation.of_files([encoded])[0])
    return code, tf.ensure_shape(image, [None, None, 3])


def try_open(stored, *, rules, load=None, whole_below=0):
    """Opens several images like `open_image`; returns codes instead of failing.

    If no image is damaged, this costs a single guard against errors.

    Args:
        stored: list of K string[], the contents of the files, or the arguments
            of `load`.
        rules: `headers.Rules`.
        load: see `source.Source`; it may fail.
        whole_below: see `open_image`.

    Returns:
        List of K `Opened`.
    """

    def load_one(item):
        return load(item) if load else (item, tf.constant(headers.OK))

    def open_one(encoded, code):
        return _open(encoded, code, rules, whole_below)

    @opaque
    def alone(item):
        _, contents = attempt(load_one, item, otherwise=("", headers.CLOSED))
        nothing = _nothing(headers.DAMAGED)
        return attempt(open_one, contents, otherwise=nothing)[1]

    def open_all(*items):
        # In sequence, because a failing call cancels concurrent ones, and the
        # error of a cancelled call is not dropped.
        found = []
        for item in items:
            with tf.control_dependencies(tf.nest.flatten(found[-1:])):
                found.append(open_one(*load_one(item)))
        return tuple(found)

    all_worked, together = attempt(
        open_all,
        tuple(stored),
        otherwise=(_nothing(headers.DAMAGED),) * len(stored),
    )
    opened = tf.cond(
        all_worked,
        lambda: list(together),
        lambda: [alone(item) for item in stored],
    )
    if not rules.exif_rotation:
        return opened
    turns = orientation.of_files([x.encoded for x in opened])
    return [_turned(x, turns[i]) for i, x in enumerate(opened)]


def _turned(opened, turn):
    """Returns an `Opened` whose pixels are or will be upright."""
    return opened._replace(
        size=orientation.upright_size(opened.size, turn),
        pixels=orientation.upright(opened.pixels, turn),
        turn=turn,
    )


def try_decode_boxes(opened, boxes, *, sizes):
    """Decodes like `decode_boxes`; a failure yields one black pixel.

    Returns:
        (code i32[], image u8[H, W, 3], boxes f32[V, 4]). The code is that of
        `opened`, or `headers.DAMAGED`.
    """

    code, image, boxes = tf.cond(
        _is_decoded(opened),
        lambda: (opened.code, opened.pixels, tf.cast(boxes, tf.float32)),
        lambda: _decode_large(opened, boxes, tuple(sizes)),
    )
    return code, tf.ensure_shape(image, [None, None, 3]), boxes


@opaque
def _decode_large(opened, boxes, sizes):
    corner = tf.tile([[0.0, 0.0, 1.0, 1.0]], [len(sizes), 1])
    worked, (image, inside) = attempt(
        lambda *tensors: decode_boxes(
            Opened(*tensors[:-1]), tensors[-1], sizes=sizes
        ),
        (*opened, boxes),
        otherwise=(_black(), corner),
    )
    return tf.where(worked, headers.OK, headers.DAMAGED), image, inside


@opaque
def _read(encoded, code, rules):
    def good(decode):
        return lambda *tensors: (tf.constant(headers.OK), decode(*tensors))

    readers = {kind: good(function) for kind, function in _DECODERS.items()}
    return headers.examine(
        encoded, code, rules, readers, lambda code: (code, _black())
    )


@opaque
def _open(encoded, code, limits, whole_below):
    def jpeg(content, size):
        return _open_jpeg(content, tf.cast(size, tf.int32), whole_below)

    def opened(decode):
        return lambda *tensors: _opened(tensors[0], decode(*tensors))

    readers = {kind: opened(function) for kind, function in _DECODERS.items()}
    readers["JPEG"] = jpeg
    return headers.examine(encoded, code, limits, readers, _nothing)


def _nothing(code):
    """Returns the `Opened` of an unreadable image, with the reason."""
    code = tf.convert_to_tensor(code)
    return Opened("", tf.ones([2], tf.int32), _black(), code)


# Functions from (contents, size) to pixels.
_DECODERS = {
    "JPEG": lambda encoded, _: _decode_jpeg(encoded),
    "PNG": lambda encoded, _: _decode_png(encoded),
    "BMP": lambda encoded, _: _decode_bmp(encoded),
    "GIF": lambda encoded, _: _decode_png(encoded),
}


def _black():
    return tf.zeros([1, 1, 3], tf.uint8)
