"""Convert photographs into files that models accept.

Models accept JPEG, PNG, BMP and GIF files and do not apply the EXIF
orientation. Training on a folder applies it and reads more formats, so the
encoder should get the same pixels here.
"""

import tensorflow as tf

from clsa_tf.data import converted, decode, headers, orientation

# Images of up to this many pixels become PNG, without loss. Larger PNG files
# would take a second each and exceed the size that models accept; JPEG loses
# less than the resizing that follows.
_LOSSLESS_PIXELS = 4_000_000
_QUALITY = 98


def prepare(content, rules):
    """Converts an image file to an upright one that a model accepts.

    Args:
        content: bytes of a file, or an `OSError`, which is returned.
        rules: `clsa_tf.data.headers.Rules`; the limits apply to files that are
            decoded here. The model has its own limits.

    Returns:
        bytes: `content` if the model accepts it, otherwise a PNG or, for large
        images, a JPEG file; or an `OSError` with the reason for the failure.
    """
    if isinstance(content, OSError):
        return content
    kind = headers.kind(content[: headers.HEAD])
    if kind == "JPEG":
        has_exif = rules.exif_rotation and b"Exif\0\0" in content
        if not has_exif or _orientation(content) == 1:
            return content
    elif not (kind in headers.CONVERTED and rules.more_formats):
        return content
    code, pixels = _pixels(content, kind, rules)
    if code != headers.OK:
        return OSError(f"the file {headers.reasons(rules)[code]}")
    return _encode(pixels)


def _pixels(content, kind, rules):
    if rules.image_bytes and len(content) > rules.image_bytes:
        return headers.BYTES, None
    if kind == "JPEG":
        code, pixels = _decode(tf.constant(content), rules)
        return int(code), pixels.numpy()
    pixels, code = converted.decode(content, rules)
    return code, pixels


@tf.function(input_signature=[tf.TensorSpec([], tf.string)])
def _orientation(content):
    return orientation.of_files([content])[0]


@tf.function(autograph=False)
def _decode(content, rules):
    return decode.try_decode(content, rules)


def _encode(pixels):
    height, width, _ = pixels.shape
    if height * width <= _LOSSLESS_PIXELS:
        return tf.io.encode_png(pixels, compression=1).numpy()
    return tf.io.encode_jpeg(
        pixels, quality=_QUALITY, chroma_downsampling=False
    ).numpy()
