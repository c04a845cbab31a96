"""Hue shift in byte-valued HSV, bit-identical to Pillow's.

Pillow uses float64 in places. Float32 gives the same bytes for all 2**24
colours and all 256 hues, and accelerators are slow at float64.
"""

import tensorflow as tf


def _to_hsv(images):
    """Pillow's byte-valued HSV.

    Args:
        images: u8[N,3,H,W].

    Returns:
        (hue i32, saturation f32, value f32), each [N,H,W] in 0..255.
    """
    planes = tf.cast(images, tf.float32)
    red, green, blue = tf.unstack(planes, num=3, axis=1)
    high = tf.maximum(tf.maximum(red, green), blue)
    low = tf.minimum(tf.minimum(red, green), blue)
    saturation = tf.floor((high - low) / tf.maximum(high, 1.0) * 255.0)

    # Hue in sixths of the circle is k + m or k - m, k odd, where m is the
    # relative gap between the highest and the middle channel. Written this
    # way, it is rounded once.
    middle_gap = 2.0 * high + low - red - green - blue
    gap = middle_gap / tf.maximum(high - low, 1.0)
    is_red, is_green = tf.equal(red, high), tf.equal(green, high)
    blue_low = tf.where(tf.equal(blue, low), 1.0, -1.0)
    red_low = tf.where(tf.equal(red, low), 1.0, -1.0)
    base = tf.where(is_green, 2.0 - blue_low, 4.0 - red_low)
    base = tf.where(is_red, blue_low, base)
    sign = tf.where(is_red, -blue_low, tf.where(is_green, blue_low, red_low))
    # The gap is at most 1, so the divisor is 6. With a constant divisor XLA
    # multiplies by the reciprocal, which rounds differently.
    turn = (base + sign * gap) / tf.maximum(gap, 6.0)
    turn = tf.where(turn < 0.0, turn + 1.0, turn)
    return tf.cast(turn * 255.0, tf.int32), saturation, high


def _from_hsv(hue, saturation, value):
    """Inverse of `_to_hsv`: three [N,H,W] -> u8[N,3,H,W]."""
    sixths = tf.cast(hue * 6, tf.float32)  # in 1/255: 0..1530
    # Adding 0.5 prevents a quotient just below a whole number.
    sextant = tf.floor((sixths + 0.5) * (1.0 / 255.0))  # 0..6
    part = (sixths - 255.0 * sextant) / 255.0
    is_odd = tf.not_equal(tf.floor(sextant * 0.5) * 2.0, sextant)
    weight = tf.where(is_odd, part, 1.0 - part)
    # In each sextant one channel is the highest, one the lowest, one between.
    share = saturation / 255.0
    low = tf.floor(value * (1.0 - share) + 0.5)
    middle = tf.floor(value * (1.0 - share * weight) + 0.5)
    sextant = tf.where(tf.equal(sextant, 6.0), 0.0, sextant)

    def channel(centre, nearest, farthest):
        """One channel: `nearest` at distance 0.5 from `centre`, middle at 1.5.

        In all other sextants it is `farthest`.
        """
        distance = tf.abs(sextant - centre)
        other = tf.where(tf.equal(distance, 1.5), middle, farthest)
        return tf.where(tf.equal(distance, 0.5), nearest, other)

    # Red is the lowest channel in sextants 2 and 3. Green is the highest in 1
    # and 2, blue the highest in 3 and 4.
    planes = [
        channel(2.5, low, value),
        channel(1.5, value, low),
        channel(3.5, value, low),
    ]
    return tf.cast(tf.stack(planes, axis=1), tf.uint8)


def shift_hue(images, shift):
    """Shifts the hue by whole steps of 1/255 of the colour circle.

    Args:
        images: u8[N,3,H,W].
        shift: i32[N] in steps, of either sign.

    Returns:
        u8[N,3,H,W].

    Source: Pillow, conversion to and from "HSV"; torchvision, `adjust_hue`
    (the hue byte wraps at 256).
    """
    hue, saturation, value = _to_hsv(images)
    # Where all channels are equal, the saturation is 0 and hue has no effect.
    hue = tf.bitwise.bitwise_and(hue + tf.reshape(shift, [-1, 1, 1]), 255)
    return _from_hsv(hue, saturation, value)
