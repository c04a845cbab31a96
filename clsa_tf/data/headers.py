"""What an image file claims to be, read from its header before it is decoded.

A file of a few kB can claim 900 million pixels, thousands of scans or frames.
Training, evaluation and exported models use the rules of this file: only what
keeps within the limits is decoded.
"""

from typing import NamedTuple

import tensorflow as tf

# A pixel of a JPEG is worked on once per scan; progressive files have about
# ten scans.
_MAX_SCANS = 20
# The largest side that a JPEG can have; resizing computes with 32 bits.
MAX_SIDE = 65_535
# Bytes that a scan of a JPEG takes at least: its header.
_SCAN_BYTES = 8
_NO_LIMIT = 2**62

MAX_IMAGE_BYTES = 20_000_000
MAX_IMAGE_PIXELS = 50_000_000

# What may be wrong with a file; `reasons` has the words.
OK, UNKNOWN, BYTES, PIXELS, DAMAGED, CLOSED, EMPTY, WEBP, TIFF, HEIC, AVIF = (
    range(11)
)

# Bytes of a file that tell its kind.
HEAD = 32
# What TensorFlow's decoders go by, and what only Pillow can read. A kind has
# (place, bytes) in common.
DECODED = {
    "JPEG": [((0, b"\xff\xd8\xff"),)],
    "PNG": [((0, b"\x89PNG\r\n\x1a\n"),)],
    "BMP": [((0, b"BM"),)],
    "GIF": [((0, b"GIF8"),)],
}
CONVERTED = {
    "WebP": [((0, b"RIFF"), (8, b"WEBP"))],
    "TIFF": [((0, b"II*\0"),), ((0, b"MM\0*"),)],
    "HEIC": [
        ((4, b"ftyp" + brand),)
        for brand in (
            *(b"heic", b"heix", b"heim", b"heis"),
            *(b"hevc", b"hevx", b"mif1", b"msf1"),
        )
    ],
    "AVIF": [((4, b"ftypavif"),), ((4, b"ftypavis"),)],
}
CODES = {"WebP": WEBP, "TIFF": TIFF, "HEIC": HEIC, "AVIF": AVIF}


class Rules(NamedTuple):
    """How the files of a dataset are read.

    Attributes:
        image_bytes: limit of a file; 0: none.
        image_pixels: limit of height times width; 0: none.
        exif_rotation: whether photographs are turned upright as their EXIF
            data say.
        more_formats: whether, in folders, WebP, TIFF, HEIC and AVIF files are
            read, and images whose names do not say that they are.
    """

    image_bytes: int = MAX_IMAGE_BYTES
    image_pixels: int = MAX_IMAGE_PIXELS
    exif_rotation: bool = True
    more_formats: bool = True


DEFAULT = Rules()


def reasons(limits):
    """Words for `OK` and the other codes, a dictionary.

    Args:
        limits: `Rules`, or another object with these limits.
    """
    words = {
        OK: "is good",
        UNKNOWN: "is not a JPEG, PNG, BMP or GIF file",
        BYTES: f"has more than {limits.image_bytes} bytes",
        PIXELS: (
            f"has more than {limits.image_pixels or 2**31} pixels, {MAX_SIDE} "
            "in a row or column, or far more scans than photographs have"
        ),
        DAMAGED: "is damaged or truncated",
        CLOSED: "cannot be opened",
        EMPTY: "is empty",
    }
    for kind, code in CODES.items():
        words[code] = f"is a {kind} file, not a JPEG, PNG, BMP or GIF file"
    return words


def kind(head):
    """Tells the kind of a file from its content.

    Args:
        head: bytes, its first `HEAD`.

    Returns:
        a key of `DECODED` or `CONVERTED`; "" for others.
    """
    for name, patterns in (DECODED | CONVERTED).items():
        for pattern in patterns:
            if all(head[i:].startswith(magic) for i, magic in pattern):
                return name
    return ""


def examine(encoded, limits):
    """Looks at the header of a file.

    Args:
        encoded: string[], the contents of the file.
        limits: `Rules`, or another object with these limits.

    Returns:
        (what to decode string[], of a GIF only its first frame; height and
        width i64[2] as claimed, 0 if they were not looked at; code i32[]).

    Raises:
        tf.errors.InvalidArgumentError: the header is damaged. The claims of a
            good header may be wrong all the same.
    """
    small = _length(encoded) <= (limits.image_bytes or _NO_LIMIT)
    known = _is_any(encoded, DECODED)

    def claims():
        cut = first_frame(encoded)
        size = _size(cut)
        return cut, size, _fits(cut, size, limits.image_pixels or _NO_LIMIT)

    def none():
        code = tf.where(small, _other_kind(encoded), BYTES)
        return encoded, tf.zeros([2], tf.int64), code

    return tf.cond(small & known, claims, none)


def _fits(encoded, size, most):
    """`OK`, or `PIXELS` if decoding would be too much work."""
    pixels = tf.reduce_prod(size)
    work = _MAX_SCANS * most
    # Counting goes through the whole file: only where scans could be many.
    count = pixels * (_length(encoded) // _SCAN_BYTES + 1) > work
    scans = tf.cond(
        count & _starts(encoded, b"\xff\xd8"),
        lambda: _scans(encoded),
        lambda: tf.constant(1, tf.int64),
    )
    fits = (
        (tf.reduce_max(size) <= MAX_SIDE)
        & (pixels <= most)
        & (pixels * scans <= work)
    )
    return tf.where(fits, OK, PIXELS)


def _length(encoded):
    return tf.cast(tf.strings.length(encoded), tf.int64)


def _starts(encoded, magic, place=0):
    return tf.strings.substr(encoded, place, len(magic)) == magic


def _is_any(encoded, kinds):
    """Whether a file is of one of these kinds; it may be too short."""
    padded = tf.strings.substr(encoded, 0, HEAD) + b"\0" * HEAD
    found = [
        tf.reduce_all([_starts(padded, magic, i) for i, magic in pattern])
        for patterns in kinds.values()
        for pattern in patterns
    ]
    return tf.reduce_any(found)


def _other_kind(encoded):
    """The code of a file that is of none of the kinds in `DECODED`."""
    code = tf.where(tf.strings.length(encoded) > 0, UNKNOWN, EMPTY)
    for name, patterns in CONVERTED.items():
        code = tf.where(_is_any(encoded, {name: patterns}), CODES[name], code)
    return code


def _size(encoded):
    """Height and width, int64[2], from the header; may fail, may be wrong."""

    def field(position, dtype, *, little_endian=True):
        raw = tf.strings.substr(encoded, position, 2 * dtype.size)
        values = tf.io.decode_raw(raw, dtype, little_endian=little_endian)
        # A header that ends too early fails here.
        width, height = tf.unstack(tf.ensure_shape(values, [2]))
        # The height of a BMP that is stored top down is negative.
        return tf.stack([abs(tf.cast(x, tf.int64)) for x in (height, width)])

    def jpeg():
        return tf.cast(tf.image.extract_jpeg_shape(encoded)[:2], tf.int64)

    size = tf.case(
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
    )
    return tf.ensure_shape(size, [2])


def _scans(encoded):
    """How often a decoder of JPEGs goes over the pixels, int64[]."""
    values = tf.io.decode_raw(encoded, tf.uint8)
    marks = (values[:-1] == 0xFF) & (values[1:] == 0xDA)
    return tf.math.count_nonzero(marks)


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


def first_frame(encoded):
    """A GIF without all but its first frame; other files as they are."""

    def cut():
        frame = _frame_at(encoded)
        data = _after_table(encoded, frame + 9, frame + 10) + 1
        end = _after_blocks(encoded, data)
        return tf.strings.substr(encoded, 0, end) + b";"

    return tf.cond(_starts(encoded, b"GIF8"), cut, lambda: encoded)
