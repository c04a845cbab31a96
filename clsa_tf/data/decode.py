"""From the bytes of an image file to pixels, and what to do if that fails."""

import tensorflow as tf


def decode(encoded) -> tf.Tensor:
    """Decodes a JPEG, PNG, BMP or GIF image.

    Grey images get three equal channels; palettes and CMYK become RGB; of an
    animation the first frame is taken; 16-bit PNGs keep the high byte. As
    with Pillow's `convert("RGB")`, alpha is dropped without blending, and a
    rotation noted in EXIF data is not applied.

    Args:
        encoded: string[], the contents of the file.

    Returns:
        u8[H, W, 3], RGB.

    Raises:
        tf.errors.InvalidArgumentError: `encoded` is none of these formats, or
            is damaged or truncated.

    Source: equal to Pillow's decoders, except for 16-bit PNGs (Pillow clips).
    """
    head = tf.strings.substr(encoded, 0, 2)
    return tf.case(
        [
            (head == b"\xff\xd8", lambda: _decode_jpeg(encoded)),
            (head == b"BM", lambda: _decode_bmp(encoded)),
        ],
        default=lambda: tf.io.decode_image(
            encoded, channels=3, expand_animations=False
        ),
    )  # [H, W, 3]


def _decode_jpeg(encoded):
    # The accurate transform is libjpeg's (and Pillow's) default and costs no
    # more; TensorFlow's default is the fast one.
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def _decode_bmp(encoded):
    pixels = tf.io.decode_bmp(encoded)  # [H, W, 1, 3 or 4]
    return tf.cond(
        tf.shape(pixels)[2] == 1,
        lambda: _apply_palette(encoded, pixels[:, :, 0]),
        lambda: pixels[:, :, :3],
    )


def _apply_palette(encoded, indices):
    """Looks 8-bit BMP pixels up, which decode_bmp takes for grey values."""
    header = tf.io.decode_raw(tf.strings.substr(encoded, 10, 8), tf.int32)
    end, begin = header[0], 14 + header[1]
    palette = tf.io.decode_raw(
        tf.strings.substr(encoded, begin, end - begin), tf.uint8
    )
    palette = tf.reshape(palette, [-1, 4])[:, 2::-1]  # BGR0 -> RGB [C, 3]
    return tf.gather(palette, tf.cast(indices, tf.int32))  # [H, W, 3]


def attempt(function, argument, *, otherwise):
    """Calls a function of a tensor that may fail, inside a graph.

    It costs about 0.1 ms per call. (A dataset that drops errors is the only
    place where TensorFlow lets a graph survive one.)

    Args:
        function: from `argument` to a structure of tensors.
        argument: a tensor.
        otherwise: the result if `function` fails; same structure and dtypes.

    Returns:
        (worked bool[], result).
    """
    good = tf.data.Dataset.from_tensors(argument).map(
        lambda tensor: (True, function(tensor))
    )
    bad = tf.data.Dataset.from_tensors((False, otherwise))
    both = good.ignore_errors().concatenate(bad)
    return both.take(1).get_single_element()


def try_decode(encoded):
    """Decodes an image, or says that it could not.

    Args:
        encoded: string[], the contents of the file.

    Returns:
        (worked bool[], image u8[H, W, 3]); a failure gives one black pixel.
    """
    black = tf.zeros([1, 1, 3], tf.uint8)
    worked, image = attempt(decode, encoded, otherwise=black)
    return worked, tf.ensure_shape(image, [None, None, 3])
