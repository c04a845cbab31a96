"""What a model cannot use as it is, made into what it can.

Models take JPEG, PNG, BMP and GIF files and use pixels as stored. Training on a
folder turns photographs upright and reads more formats, so that its encoder
should get the same pixels here.
"""

import tensorflow as tf

from clsa_tf.data import converted, decode, headers, orientation

# Up to so many pixels PNG, without loss. Larger ones would take a second each
# and more bytes than models accept; they lose less than the resizing does.
_LOSSLESS_PIXELS = 4_000_000
_QUALITY = 98


def prepare(content, rules):
    """Makes an image file one that a model takes, upright.

    Args:
        content: bytes, or an `OSError` instead.
        rules: `clsa_tf.data.headers.Rules`; the limits are for what is decoded
            here. The model has its own.

    Returns:
        bytes: the same if nothing had to be done, otherwise PNG or, of large
        images, JPEG; or an `OSError` that says why not.
    """
    if isinstance(content, OSError):
        return content
    kind = headers.kind(content[: headers.HEAD])
    if kind == "JPEG":
        turns = rules.exif_rotation and b"Exif\0\0" in content
        if not turns or _orientation(content) == 1:
            return content
    elif not (kind in headers.CONVERTED and rules.more_formats):
        return content
    code, pixels = _pixels(content, kind, rules)
    if code != headers.OK:
        return OSError(f"the file {headers.reasons(rules)[code]}")
    return _encoded(pixels)


def _pixels(content, kind, rules):
    if rules.image_bytes and len(content) > rules.image_bytes:
        return headers.BYTES, None
    if kind == "JPEG":
        code, pixels = _decoded(tf.constant(content), rules)
        return int(code), pixels.numpy()
    pixels, code = converted.decode(content, rules)
    return code, pixels


@tf.function(input_signature=[tf.TensorSpec([], tf.string)])
def _orientation(content):
    return orientation.of_files([content])[0]


@tf.function(autograph=False)
def _decoded(content, rules):
    return decode.try_decode(content, rules)


def _encoded(pixels):
    height, width, _ = pixels.shape
    if height * width <= _LOSSLESS_PIXELS:
        return tf.io.encode_png(pixels, compression=1).numpy()
    return tf.io.encode_jpeg(
        pixels, quality=_QUALITY, chroma_downsampling=False
    ).numpy()
