"""What an image file claims to be, read from its header before it is decoded.

A file of a few kB can claim 900 million pixels, thousands of scans or frames.
Training, evaluation and exported models use the rules of this file: only what
keeps within the limits is decoded.
"""

import functools
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

# Not wrong: a converted file, which was within the limits as it was. As a BMP
# it may have more bytes than a file may.
CHECKED = -1

# Bytes of a file that tell its kind.
HEAD = 32
# (place, bytes there) of each kind: first what TensorFlow decodes, then what
# only Pillow can read.
DECODED = {
    "JPEG": [(0, b"\xff\xd8\xff")],
    "PNG": [(0, b"\x89PNG\r\n\x1a\n")],
    "BMP": [(0, b"BM")],
    "GIF": [(0, b"GIF8")],
}
_HEIC_BRANDS = b"heic heix heim heis hevc hevx mif1 msf1".split()
CONVERTED = {
    "WebP": [(8, b"WEBP")],
    "TIFF": [(0, b"II*\0"), (0, b"MM\0*")],
    "HEIC": [(4, b"ftyp" + brand) for brand in _HEIC_BRANDS],
    "AVIF": [(4, b"ftypavif"), (4, b"ftypavis")],
}
CODES = {"WebP": WEBP, "TIFF": TIFF, "HEIC": HEIC, "AVIF": AVIF}
_KINDS = [*DECODED, *CONVERTED]
_NUMBERS = {kind: number for number, kind in enumerate([*_KINDS, "none"])}
_PATTERNS = [
    (_NUMBERS[kind], place, magic)
    for kind, patterns in (DECODED | CONVERTED).items()
    for place, magic in patterns
]


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
    for number, place, magic in _PATTERNS:
        if head[place:].startswith(magic):
            return _KINDS[number]
    return ""


def examine(encoded, code, limits, readers, refuse):
    """Looks at the header of a file, and reads it if that is good.

    Few branches and loops: TensorFlow prepares each of them, for every place
    that uses this, when a dataset is first read.

    Args:
        encoded: string[], the contents of the file.
        code: i32[], why there are no contents, or `OK` or `CHECKED`.
        limits: `Rules`, or another object with these limits.
        readers: for each key of `DECODED`, a function from the contents (of a
            GIF with its first frame only) and height and width i64[2] as
            claimed to a structure of tensors. Claims may be wrong.
        refuse: function from a code i32[], why it is not read, to the same
            structure.

    Returns:
        what one of these functions returned.

    Raises:
        tf.errors.InvalidArgumentError: the header is damaged.
    """
    most = limits.image_bytes or _NO_LIMIT
    length = tf.cast(tf.strings.length(encoded), tf.int64)
    number = _kind_number(encoded)
    codes = tf.constant([OK] * len(DECODED) + [*CODES.values(), UNKNOWN])
    found = tf.where(length > 0, tf.gather(codes, number), EMPTY)
    checked = tf.equal(code, CHECKED)
    found = tf.where((length <= most) | checked, found, BYTES)
    code = tf.where((code == OK) | checked, found, code)
    number = tf.where(code == OK, number, _NUMBERS["none"])
    encoded, frame = _first_frame(encoded, number)
    size = _size(encoded, number, frame)
    fits = _fits(encoded, size, number, limits)
    code = tf.where((code == OK) & ~fits, PIXELS, code)
    return tf.switch_case(
        tf.where(code == OK, number, len(DECODED)),
        [
            *(functools.partial(readers[x], encoded, size) for x in DECODED),
            lambda: refuse(code),
        ],
    )


def _kind_number(encoded):
    """The place of a file's kind in `_KINDS`; their number for others."""
    numbers, places, magics = zip(*_PATTERNS)
    padded = tf.strings.substr(encoded, 0, HEAD) + b"\0" * HEAD
    found = tf.strings.substr(
        tf.fill([len(magics)], padded), places, [len(x) for x in magics]
    )
    matches = tf.concat([found == tf.constant(magics), [True]], axis=0)
    return tf.constant([*numbers, _NUMBERS["none"]])[tf.argmax(matches)]


def _fits(encoded, size, number, limits):
    """Whether decoding is not too much work."""
    most = limits.image_pixels or _NO_LIMIT // _MAX_SCANS
    pixels = tf.reduce_prod(size)
    fits = (tf.reduce_max(size) <= MAX_SIDE) & (pixels <= most)
    # Counting goes through the whole file: only where scans could be many.
    length = tf.cast(tf.strings.length(encoded), tf.int64)
    many = pixels * (length // _SCAN_BYTES + 1) > _MAX_SCANS * most
    scans = tf.cond(
        (number == _NUMBERS["JPEG"]) & fits & many,
        lambda: _scans(encoded),
        lambda: tf.constant(1, tf.int64),
    )
    return fits & (pixels * scans <= _MAX_SCANS * most)


def _size(encoded, number, frame):
    """Height and width, int64[2], from the header; may fail, may be wrong.

    Args:
        encoded: string[].
        number: i32[], of the kind in `_KINDS`; of others the size is 0.
        frame: i32[], where that of a GIF is described.
    """

    def jpeg():
        return tf.cast(tf.image.extract_jpeg_shape(encoded)[:2], tf.int64)

    def other():
        # The screen of a GIF need not be that of its frame.
        places = [0, 16, 18, frame + 5]
        position = tf.gather([*places, 0], tf.minimum(number, len(places)))
        width = tf.gather([0, 4, 4, 2, 0], tf.minimum(number, len(places)))
        raw = tf.strings.substr(encoded, position, 2 * width)
        digits = tf.cast(tf.io.decode_raw(raw, tf.uint8), tf.int64)
        # A header that ends too early fails here.
        digits = tf.reshape(digits, [2, width])
        big = number == _NUMBERS["PNG"]
        digits = tf.where(big, digits[:, ::-1], digits)
        units = 256 ** tf.range(tf.cast(width, tf.int64))
        columns, rows = tf.unstack(tf.reduce_sum(digits * units, axis=1))
        # The height of a BMP that is stored top down is negative.
        return tf.stack([tf.where(rows >= 2**31, 2**32 - rows, rows), columns])

    size = tf.cond(number == _NUMBERS["JPEG"], jpeg, other)
    return tf.ensure_shape(size, [2])


def _scans(encoded):
    """How often a decoder of JPEGs goes over the pixels, int64[]."""
    values = tf.io.decode_raw(encoded, tf.uint8)
    marks = (values[:-1] == 0xFF) & (values[1:] == 0xDA)
    return tf.math.count_nonzero(marks)


# --- GIF --------------------------------------------------------------------
# TensorFlow's decoder unpacks all frames, of which it is asked for the first.

_EXTENSION = 0x21


def _first_frame(encoded, number):
    """Cuts off what follows the first frame of a GIF.

    Blocks follow each other, and each says its length first, until one of
    length 0: extensions, which begin with "!", then the frame.

    Args:
        encoded: string[].
        number: i32[], of the kind in `_KINDS`.

    Returns:
        (the contents, of other kinds as they are; where the description of
        the frame begins i32[], 0 for other kinds).
    """

    last = tf.strings.length(encoded) - 1

    def table_ends(flags_at, begin):
        flags = _byte(encoded, tf.minimum(flags_at, last))
        entries = tf.bitwise.left_shift(2, tf.bitwise.bitwise_and(flags, 7))
        return begin + tf.where(flags >= 128, 3 * entries, 0)

    def step(position, frame, in_chain):
        byte = _byte(encoded, position)  # fails behind the end
        extends = byte == _EXTENSION
        starts = ~in_chain & ~extends
        data = table_ends(position + 9, position + 10) + 1
        following = tf.where(extends, position + 2, data)
        following = tf.where(in_chain, position + 1 + byte, following)
        frame = tf.where(starts, position, frame)
        return following, frame, ~in_chain | (byte > 0)

    def cut():
        end, frame, _ = tf.while_loop(
            lambda _, frame, in_chain: (frame == 0) | in_chain,
            step,
            (table_ends(10, 13), tf.constant(0), tf.constant(False)),
            parallel_iterations=1,
        )
        return tf.strings.substr(encoded, 0, end) + b";", frame

    return tf.cond(number == _NUMBERS["GIF"], cut, lambda: (encoded, 0))


def _byte(encoded, position):
    raw = tf.strings.substr(encoded, position, 1)
    return tf.cast(tf.io.decode_raw(raw, tf.uint8)[0], tf.int32)
