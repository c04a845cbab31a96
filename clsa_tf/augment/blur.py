"""Gaussian blur, bit-identical to Pillow's."""

import math

import tensorflow as tf

from clsa_tf.augment import primitives

MAX_SIGMA = 2.0  # pixels
# Neighbours that one box blur of MAX_SIGMA reads on each side.
_REACH = 1 + int((math.sqrt(4.0 * MAX_SIGMA**2 + 1.0) - 1.0) / 2.0)


def _box_weights(sigma):
    """Weights of one box blur, in units of 2**-24.

    Three box blurs of a fractional radius approximate a Gaussian. Float32 and
    float64 are mixed as in Pillow.

    Args:
        sigma: f32[N], in pixels.

    Returns:
        list of u32[N,1,1,1]. Entry d is the weight of the two pixels at
        distance d.
    """
    variance = sigma * sigma / 3.0
    length = tf.sqrt(12.0 * tf.cast(variance, tf.float64) + 1.0)
    length = tf.cast(length, tf.float32)
    whole = tf.floor((length - 1.0) / 2.0)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) * (whole + 1))
    inside = tf.cast(2.0**24 / ((whole + part) * 2 + 1), tf.int32)
    radius = tf.cast(whole, tf.int32)
    edge = (2**24 - (radius * 2 + 1) * inside) // 2
    weights = []
    for distance in range(_REACH + 1):
        outside = tf.where(tf.equal(distance, radius + 1), edge, 0)
        weight = tf.where(distance <= radius, inside, outside)
        weights.append(primitives.per_image(tf.cast(weight, tf.uint32)))
    return weights


def _box_blur(images, weights):
    """One box blur of u8[N,3,H,W] along axis H, edges replicated."""
    height, _ = primitives.size(images)
    first, last = images[:, :, :1], images[:, :, -1:]
    padded = tf.concat([first] * _REACH + [images] + [last] * _REACH, axis=2)
    padded = tf.cast(padded, tf.uint32)

    def shifted(rows):
        begin = _REACH + rows
        return padded[:, :, begin : begin + height]

    total = shifted(0) * weights[0] + tf.constant(2**23, tf.uint32)
    for distance in range(1, _REACH + 1):
        pair = shifted(-distance) + shifted(distance)
        total += pair * weights[distance]
    total = tf.bitwise.right_shift(total, tf.constant(24, tf.uint32))
    return tf.cast(total, tf.uint8)


def _blur_columns(images, weights):
    """Three box blurs of u8[N,3,H,W] along axis H."""

    # A loop makes XLA complete each pass before the next. Unrolled, XLA fuses
    # the passes and recomputes the first for each pixel that the second reads.
    def step(i, images):
        blurred = _box_blur(images, weights)
        return i + 1, tf.ensure_shape(blurred, images.shape)

    return tf.while_loop(lambda i, _: i < 3, step, (0, images))[1]


def blur_and_transpose(images, sigma):
    """Gaussian blur as in Pillow: three box blurs per axis, rounded to bytes.

    The result is close to a true Gaussian: at sigma = 1 an impulse of 255
    leaves 42 in its centre, and a true Gaussian leaves 40.6.

    Args:
        images: u8[N,3,W,H], transposed. Pillow blurs along x first, and here x
            is the first spatial axis: the neighbours of a contiguous row are
            contiguous rows.
        sigma: f32[N], in pixels, in [0, MAX_SIGMA].

    Returns:
        u8[N,3,H,W], not transposed.

    Source: Pillow, `ImageFilter.GaussianBlur`.
    """
    weights = _box_weights(tf.cast(sigma, tf.float32))
    images = _blur_columns(images, weights)
    return _blur_columns(tf.transpose(images, [0, 1, 3, 2]), weights)
