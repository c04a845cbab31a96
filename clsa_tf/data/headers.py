"""Checks the header of an image file before the file is decoded.

A file of a few kB can claim 900 million pixels, or thousands of scans or
frames. Training, evaluation and exported models use the rules of this module
and decode only files within the limits.
"""

import functools
from typing import NamedTuple

import tensorflow as tf

# A decoder processes each pixel of a JPEG once per scan. Progressive files have
# about ten scans.
_MAX_SCANS = 20
# Largest possible side of a JPEG. Resizing computes with 32 bits.
MAX_SIDE = 65_535
# Smallest size of a scan of a JPEG in bytes: its header.
_SCAN_BYTES = 8
_NO_LIMIT = 2**62

MAX_IMAGE_BYTES = 20_000_000
MAX_IMAGE_PIXELS = 50_000_000

# Codes: why a file is unreadable. `reasons` returns their texts.
OK, UNKNOWN, BYTES, PIXELS, DAMAGED, CLOSED, EMPTY, WEBP, TIFF, HEIC, AVIF = (
    range(11)
)

# Not an error: a converted file. The original was within the limits, but its
# conversion to BMP may have more bytes than the limit.
CHECKED = -1

# Number of bytes at the start of a file that determine its kind.
HEAD = 32
# (offset, bytes there) of each kind. DECODED: TensorFlow decodes it. CONVERTED:
# only Pillow can read it.
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
        image_bytes: largest size of a file in bytes; 0 for no limit.
        image_pixels: largest height times width; 0 for no limit.
        exif_rotation: whether photographs are rotated upright as their EXIF
            data specify.
        more_formats: whether to read, in folders, also WebP, TIFF, HEIC and
            AVIF files, and images without the suffix of an image.
    """

    image_bytes: int = MAX_IMAGE_BYTES
    image_pixels: int = MAX_IMAGE_PIXELS
    exif_rotation: bool = True
    more_formats: bool = True


DEFAULT = Rules()


def reasons(limits):
    """Returns {code: text}, clauses that follow "which".

    Args:
        limits: `Rules`, or another object with these limits.
    """
    words = {
        OK: "is good",
        UNKNOWN: "is not a JPEG, PNG, BMP or GIF file",
        BYTES: f"has more than {limits.image_bytes} bytes",
        PIXELS: (
            f"has more than {limits.image_pixels or 2**31} pixels in all or "
            f"{MAX_SIDE} in a row or column, or far more scans than "
            "photographs have"
        ),
        DAMAGED: "is damaged or truncated",
        CLOSED: "cannot be opened",
        EMPTY: "is empty",
    }
    for kind, code in CODES.items():
        words[code] = f"is a {kind} file, not a JPEG, PNG, BMP or GIF file"
    return words


def kind(head):
    """Finds the kind of a file by its content.

    Args:
        head: the first `HEAD` bytes of the file.

    Returns:
        A key of `DECODED` or `CONVERTED`; "" for other files.
    """
    for number, place, magic in _PATTERNS:
        if head[place:].startswith(magic):
            return _KINDS[number]
    return ""


def examine(encoded, code, limits, readers, reject):
    """Checks the header of a file, and reads the file if it passes.

    It uses few branches and loops, because TensorFlow prepares each of them,
    at every place of use, when a dataset is first read.

    Args:
        encoded: string[], the contents of the file.
        code: i32[], `OK`, `CHECKED`, or the reason why there are no contents.
        limits: `Rules`, or another object with these limits.
        readers: for each key of `DECODED`, a function (contents string[],
            size i64[2]) -> structure of tensors. The contents of a GIF have
            only its first frame. The size is height and width as in the
            header, which may be wrong.
        reject: function from a code i32[], the reason for not reading the
            file, to the same structure.

    Returns:
        The result of one of these functions.

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
            lambda: reject(code),
        ],
    )


def _kind_number(encoded):
    """Returns the index of the kind in `_KINDS`; their number for others."""
    numbers, places, magics = zip(*_PATTERNS)
    padded = tf.strings.substr(encoded, 0, HEAD) + b"\0" * HEAD
    found = tf.strings.substr(
        tf.fill([len(magics)], padded), places, [len(x) for x in magics]
    )
    matches = tf.concat([found == tf.constant(magics), [True]], axis=0)
    return tf.constant([*numbers, _NUMBERS["none"]])[tf.argmax(matches)]


def _fits(encoded, size, number, limits):
    """Returns whether decoding stays within the limits."""
    most = limits.image_pixels or _NO_LIMIT // _MAX_SCANS
    pixels = tf.reduce_prod(size)
    fits = (tf.reduce_max(size) <= MAX_SIDE) & (pixels <= most)
    # Counting reads the whole file, so do it only if there may be many scans.
    length = tf.cast(tf.strings.length(encoded), tf.int64)
    many = pixels * (length // _SCAN_BYTES + 1) > _MAX_SCANS * most
    scans = tf.cond(
        (number == _NUMBERS["JPEG"]) & fits & many,
        lambda: _scans(encoded),
        lambda: tf.constant(1, tf.int64),
    )
    return fits & (pixels * scans <= _MAX_SCANS * most)


def _size(encoded, number, frame):
    """Returns height and width i64[2] from the header; may fail or be wrong.

    Args:
        encoded: string[], the contents of the file.
        number: i32[], index of the kind in `_KINDS`. Other kinds have size 0.
        frame: i32[], position of the frame's description in a GIF.
    """

    def jpeg():
        return tf.cast(tf.image.extract_jpeg_shape(encoded)[:2], tf.int64)

    def other():
        # The screen of a GIF may differ in size from its frame.
        places = [0, 16, 18, frame + 5]
        position = tf.gather([*places, 0], tf.minimum(number, len(places)))
        width = tf.gather([0, 4, 4, 2, 0], tf.minimum(number, len(places)))
        raw = tf.strings.substr(encoded, position, 2 * width)
        digits = tf.cast(tf.io.decode_raw(raw, tf.uint8), tf.int64)
        # Fails for a truncated header.
        digits = tf.reshape(digits, [2, width])
        big = number == _NUMBERS["PNG"]
        digits = tf.where(big, digits[:, ::-1], digits)
        units = 256 ** tf.range(tf.cast(width, tf.int64))
        columns, rows = tf.unstack(tf.reduce_sum(digits * units, axis=1))
        # A BMP stored from top to bottom has a negative height.
        return tf.stack([tf.where(rows >= 2**31, 2**32 - rows, rows), columns])

    size = tf.cond(number == _NUMBERS["JPEG"], jpeg, other)
    return tf.ensure_shape(size, [2])


def _scans(encoded):
    """Counts the scans of a JPEG, i64[]."""
    values = tf.io.decode_raw(encoded, tf.uint8)
    marks = (values[:-1] == 0xFF) & (values[1:] == 0xDA)
    return tf.math.count_nonzero(marks)


# --- GIF --------------------------------------------------------------------
# TensorFlow's decoder unpacks all frames, although only the first is needed.

_EXTENSION = 0x21


def _first_frame(encoded, number):
    """Removes everything after the first frame of a GIF.

    A GIF holds extensions, which start with "!", then a frame. The data of each
    is a chain of blocks. Each block starts with its length, and a block of
    length 0 ends the chain.

    Args:
        encoded: string[], the contents of the file.
        number: i32[], index of the kind in `_KINDS`.

    Returns:
        (contents string[], unchanged for other kinds; position of the frame's
        description i32[], 0 for other kinds).
    """

    last = tf.strings.length(encoded) - 1

    def table_ends(flags_at, begin):
        flags = _byte(encoded, tf.minimum(flags_at, last))
        entries = tf.bitwise.left_shift(2, tf.bitwise.bitwise_and(flags, 7))
        return begin + tf.where(flags >= 128, 3 * entries, 0)

    def step(position, frame, in_chain):
        byte = _byte(encoded, position)  # fails past the end
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
