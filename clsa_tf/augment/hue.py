"""Turning the colour circle, as Pillow's byte-valued HSV does, to the bit.

Pillow computes in float64 here and there. Float32 alone cuts to the same bytes,
for all 2**24 colours and all 256 hues; accelerators are slow at more.
"""

import tensorflow as tf


def _to_hsv(images):
    """Pillow's byte HSV of u8[N,3,H,W]: hue i32, the others f32, [N,H,W]."""
    planes = tf.cast(images, tf.float32)
    red, green, blue = tf.unstack(planes, num=3, axis=1)
    high = tf.maximum(tf.maximum(red, green), blue)
    low = tf.minimum(tf.minimum(red, green), blue)
    saturation = tf.floor((high - low) / tf.maximum(high, 1.0) * 255.0)

    # Hue in sixths of the circle is k + m or k - m, k odd, where m tells how
    # far the middle channel lies below the highest; hence one rounding.
    middle_gap = 2.0 * high + low - red - green - blue
    gap = middle_gap / tf.maximum(high - low, 1.0)
    is_red, is_green = tf.equal(red, high), tf.equal(green, high)
    blue_low = tf.where(tf.equal(blue, low), 1.0, -1.0)
    red_low = tf.where(tf.equal(red, low), 1.0, -1.0)
    base = tf.where(is_green, 2.0 - blue_low, 4.0 - red_low)
    base = tf.where(is_red, blue_low, base)
    sign = tf.where(is_red, -blue_low, tf.where(is_green, blue_low, red_low))
    # The gap is at most 1: that is 6. By a constant XLA does not divide, it
    # multiplies with the reciprocal, which rounds differently.
    turn = (base + sign * gap) / tf.maximum(gap, 6.0)
    turn = tf.where(turn < 0.0, turn + 1.0, turn)
    return tf.cast(turn * 255.0, tf.int32), saturation, high


def _from_hsv(hue, saturation, value):
    """Back to u8[N,3,H,W] from i32 and f32 [N,H,W] of bytes."""
    sixths = tf.cast(hue * 6, tf.float32)  # in 1/255: 0..1530
    # Half a step keeps the quotient from falling short of a whole number.
    sextant = tf.floor((sixths + 0.5) * (1.0 / 255.0))  # 0..6
    part = (sixths - 255.0 * sextant) / 255.0
    is_odd = tf.not_equal(tf.floor(sextant * 0.5) * 2.0, sextant)
    weight = tf.where(is_odd, part, 1.0 - part)
    # One channel is the highest, one the lowest, and one in between.
    share = saturation / 255.0
    low = tf.floor(value * (1.0 - share) + 0.5)
    middle = tf.floor(value * (1.0 - share * weight) + 0.5)
    sextant = tf.where(tf.equal(sextant, 6.0), 0.0, sextant)

    def channel(centre, nearest, farthest):
        """The sextants whose middles are that far from `centre` differ."""
        distance = tf.abs(sextant - centre)
        other = tf.where(tf.equal(distance, 1.5), middle, farthest)
        return tf.where(tf.equal(distance, 0.5), nearest, other)

    # Red is the lowest in sextants 2 and 3, green the highest in 1 and 2, blue
    # in 3 and 4.
    planes = [
        channel(2.5, low, value),
        channel(1.5, value, low),
        channel(3.5, value, low),
    ]
    return tf.cast(tf.stack(planes, axis=1), tf.uint8)


def shift_hue(images, shift):
    """Turns the colour circle by whole steps of 1/255.

    Args:
        images: u8[N,3,H,W].
        shift: i32[N], any sign.

    Returns:
        u8[N,3,H,W].

    Source: Pillow, conversion to and from "HSV"; torchvision, `adjust_hue`
    (the hue byte wraps at 256).
    """
    hue, saturation, value = _to_hsv(images)
    # Where all channels are equal the saturation is 0 and hue plays no part.
    hue = tf.bitwise.bitwise_and(hue + tf.reshape(shift, [-1, 1, 1]), 255)
    return _from_hsv(hue, saturation, value)
