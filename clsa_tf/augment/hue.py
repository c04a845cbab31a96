"""Turning the colour circle, as Pillow's byte-valued HSV does, to the bit."""

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
    sixths = tf.cast(base + sign * gap, tf.float64)
    # Pillow's mixture of float64 and float32 decides the cut to a byte.
    turn = sixths / 6.0 + 1.0
    turn = tf.cast(turn - tf.floor(turn), tf.float32)
    hue = tf.cast(tf.cast(turn, tf.float64) * 255.0, tf.int32)
    return hue, saturation, high


def _weight(position):
    """Share of the saturation that one channel loses.

    0 where the channel is the highest, 1 where it is the lowest of the three.

    Args:
        position: f32, whole numbers: hue relative to the channel's own, in
            1/255 of a sixth of the circle, in 0..1530.
    """
    rising = tf.clip_by_value(510.0 - tf.abs(position - 765.0), 0.0, 255.0)
    # Pillow takes 1 - x, not x, on the one side; they round differently.
    falling = 1.0 - (255.0 - rising) / 255.0
    return tf.where(position > 765.0, falling, rising / 255.0)


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
    red = tf.cast(hue * 6, tf.float32)
    # Green and blue follow red at a distance of a third of the circle.
    positions = [red, red - 510.0, red - 1020.0]
    share = saturation / 255.0
    planes = [
        value * (1.0 - share * _weight(tf.where(x < 0.0, x + 1530.0, x)))
        for x in positions
    ]
    return tf.cast(tf.stack(planes, axis=1) + 0.5, tf.uint8)
