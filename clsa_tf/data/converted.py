"""Reads WebP, TIFF, HEIC and AVIF files, which TensorFlow cannot decode.

Pillow reads them in this process. It passes their pixels to TensorFlow as a BMP
file, which costs little more than a copy.
"""

import functools
import io
import os
import stat

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps, features

from clsa_tf.data import headers

SUFFIXES = {
    ".webp": "WebP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".heic": "HEIC",
    ".heif": "HEIC",
    ".avif": "AVIF",
}
_MISSING = {
    "WebP": "needs a Pillow with WebP",
    "TIFF": "needs Pillow",
    "HEIC": "needs pip install 'clsa_tf[heif]'",
    "AVIF": "needs Pillow 11.3 or newer",
}
# Kind -> format of Pillow. No other decoder of Pillow gets a file.
_FORMATS = {"WebP": "WEBP", "TIFF": "TIFF", "HEIC": "HEIF", "AVIF": "AVIF"}


@functools.lru_cache(maxsize=None)  # called for every file
def missing(kind) -> str:
    """Returns what to install for a kind of file; "" if nothing is missing.

    Args:
        kind: a key of `headers.CONVERTED`.
    """
    if kind == "HEIC":
        there = _with_heif()
    elif kind == "TIFF":
        there = True
    else:
        name = kind.lower()
        there = name in features.modules and features.check_module(name)
    return "" if there else _MISSING[kind]


def _with_heif():
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def read(path, rules):
    """Reads a file that TensorFlow may be unable to decode.

    Args:
        path: local path, or a URL that `tf.io.gfile` supports; str or bytes.
        rules: `headers.Rules`.

    Returns:
        (bytes for `decode.decode`, a code of `headers`). JPEGs and other files
        that TensorFlow decodes are unchanged, with `headers.OK`. Converted
        files have `headers.CHECKED`. With other codes the bytes are empty.
    """
    try:
        content = _content(os.fsdecode(path), rules.image_bytes)
    except (OSError, tf.errors.OpError):
        return b"", headers.CLOSED
    if content is None:
        return b"", headers.BYTES
    if headers.kind(content[: headers.HEAD]) not in headers.CONVERTED:
        return content, headers.OK
    pixels, code = decode(content, rules)
    if code != headers.OK:
        return b"", code
    return _bmp(pixels), headers.CHECKED


def _content(path, most):
    """Returns the content of a file; None if it exceeds `most` bytes."""
    if "://" in path:
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.read() if file.size() <= (most or np.inf) else None
    # O_NONBLOCK, because opening a pipe would wait. A pipe is then rejected.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError("not a regular file")
        return file.read() if found.st_size <= (most or np.inf) else None


def decode(content, rules):
    """Decodes the first image of a WebP, TIFF, HEIC or AVIF file.

    16-bit pixels keep the high byte. Alpha is dropped without blending.

    Args:
        content: bytes of the file.
        rules: `headers.Rules`. The rotation of a TIFF file, and the rotation
            that HEIC and AVIF files store outside of EXIF data, are a part of
            the image. Pillow always applies them.

    Returns:
        (u8[H, W, 3], `headers.OK`) or (None, another code).
    """
    kind = headers.kind(content[: headers.HEAD])
    if kind not in headers.CONVERTED:
        return None, headers.UNKNOWN
    if missing(kind):
        return None, headers.CODES[kind]
    _allow(rules.image_pixels)
    try:
        with Image.open(io.BytesIO(content), formats=[_FORMATS[kind]]) as image:
            width, height = image.size
            if width * height > (rules.image_pixels or np.inf) or (
                max(width, height) > headers.MAX_SIDE
            ):
                return None, headers.PIXELS
            return _rgb(image, rules.exif_rotation), headers.OK
    except Image.DecompressionBombError:
        return None, headers.PIXELS
    # Pillow's plugins raise many kinds of exceptions.
    except Exception:
        return None, headers.DAMAGED


def _allow(pixels):
    """Extends Pillow's process-wide limit to `pixels`, if that is larger.

    Pillow warns above 89 million pixels, but a flag may allow larger images.
    """
    if Image.MAX_IMAGE_PIXELS and not 0 < pixels <= Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = pixels or None


def _rgb(image, exif_rotation):
    if exif_rotation:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey = np.asarray(image) >> 8
        return np.repeat(grey.astype(np.uint8)[:, :, np.newaxis], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("values of 32 bits, whose white is not known")
    return np.asarray(image.convert("RGB"))


def _bmp(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()
