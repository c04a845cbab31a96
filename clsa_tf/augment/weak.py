"""The weak augmentation that follows the crop: MoCo v2's chain on bytes.

Colour jitter, greyscale, Gaussian blur, horizontal flip, in this order; `draw`
decides, `apply` executes. Every step gives what torchvision gives on Pillow
images, byte for byte. Source: maple-research-lab/CLSA@37df76c,
data_processing/Multi_FixTransform.py; torchvision, `ColorJitter`.
"""

import itertools

import numpy as np
import tensorflow as tf

from clsa_tf.augment import primitives

JITTERS = ("brightness", "contrast", "saturation", "hue")
_CENTRES = np.array([1.0, 1.0, 1.0, 0.0], np.float32)
_SPREADS = np.array([0.4, 0.4, 0.4, 0.1], np.float32)
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)  # [24,4]
_SIGMA_RANGE = (0.1, 2.0)  # pixels
_NARROW_SIGMA = 1.4  # below sqrt(2) one neighbour on each side is enough


def draw(seed, *, blur=0.5):
    """Draws the parameters of one weak view.

    Args:
        seed: i32[2].
        blur: probability of the Gaussian blur, in [0, 1].

    Returns:
        dict of scalars unless stated: `jitter` bool, p 0.8; `factors` f32[4]
        in the order of `JITTERS`, the first three in [0.6, 1.4], hue in
        [-0.1, 0.1] of the colour circle; `order` i32[4], indices into
        `JITTERS`; `gray` bool, p 0.2; `blur` bool; `sigma` f32 in
        [0.1, 2.0], pixels; `flip` bool, p 0.5.
    """
    uniform = primitives.uniform(seed, shape=[10])
    factors = _CENTRES + _SPREADS * (2.0 * uniform[:4] - 1.0)
    order, sigma, jitter, gray, blurred, flip = tf.unstack(uniform[4:])
    low, high = _SIGMA_RANGE
    return {
        "jitter": jitter < 0.8,
        "factors": factors,
        "order": tf.gather(_ORDERS, tf.cast(order * 24, tf.int32)),
        "gray": gray < 0.2,
        "blur": blurred < blur,
        "sigma": low + (high - low) * sigma,
        "flip": flip < 0.5,
    }


def apply(image, params):
    """Executes a drawn weak chain on one image.

    Args:
        image: u8[H,W,3].
        params: what `draw` returns.

    Returns:
        u8[H,W,3].
    """
    images = tf.expand_dims(image, 0)
    steps = (
        ("jitter", lambda x: _jitter(x, params["factors"], params["order"])),
        ("gray", primitives.grayscale),
        ("blur", lambda x: _blur(x, params["sigma"])),
        ("flip", lambda x: tf.reverse(x, axis=[2])),
    )
    for name, step in steps:
        images = tf.cond(
            params[name],
            lambda step=step, images=images: step(images),
            lambda images=images: images,
        )
    return images[0]


def _jitter(images, factors, order):
    """The four colour changes of one image, u8[1,H,W,3], in the given order."""

    def step(i, images):
        factor = factors[order[i], tf.newaxis]  # [1]
        # int() of Python cuts towards zero; the product is taken in float64.
        shift = tf.cast(tf.cast(factor, tf.float64) * 255.0, tf.int32)
        branches = [
            lambda: primitives.brightness(images, factor),
            lambda: primitives.contrast(images, factor),
            lambda: primitives.color(images, factor),
            lambda: shift_hue(images, shift),
        ]
        result = tf.switch_case(order[i], branches)
        return i + 1, tf.ensure_shape(result, images.shape)

    loop = (lambda i, _: i < len(JITTERS)), step, (0, images)
    return tf.while_loop(*loop)[1]


def _blur(images, sigma):
    """Blurs one image; most draws need only the nearest neighbours."""
    sigma = sigma[tf.newaxis]

    def blur(max_sigma):
        return primitives.gaussian_blur(images, sigma, max_sigma=max_sigma)

    return tf.cond(
        sigma[0] <= _NARROW_SIGMA,
        lambda: blur(_NARROW_SIGMA),
        lambda: blur(_SIGMA_RANGE[1]),
    )


# --- hue --------------------------------------------------------------------


def _hue_weights():
    """Share of the saturation that each hue takes from each channel.

    f32[256,3]: entry h, c is 0 where channel c stays at the value, 1 where it
    falls to the lowest of the three.
    """
    position = np.arange(256) * 6.0 / 255.0
    sector = np.floor(position)
    rising = (position - sector).astype(np.float32)
    falling = 1 - rising
    zero, one = np.zeros(256, np.float32), np.ones(256, np.float32)
    red = [zero, rising, one, one, falling, zero]
    sector = sector.astype(int) % 6
    # Green and blue follow red at a distance of two sectors.
    return np.stack(
        [
            np.choose(sector, red[-lag:] + red[:-lag] if lag else red)
            for lag in (0, 2, 4)
        ],
        axis=1,
    )


_HUE_WEIGHTS = _hue_weights()


def _hue_saturation_value(images):
    """Pillow's byte HSV of u8[N,H,W,3]: hue i32, the others f32, [N,H,W]."""
    red, green, blue = tf.unstack(tf.cast(images, tf.float32), num=3, axis=-1)
    high = tf.maximum(tf.maximum(red, green), blue)
    low = tf.minimum(tf.minimum(red, green), blue)
    spread = tf.maximum(high - low, 1.0)
    saturation = tf.floor((high - low) / tf.maximum(high, 1.0) * 255.0)

    # Hue in sixths of the circle is k + m or k - m, k odd, where m tells how
    # far the middle channel lies below the highest; hence one rounding.
    middle_gap = 2.0 * high + low - red - green - blue
    gap = middle_gap / spread
    is_red = tf.cast(tf.equal(red, high), tf.float32)
    is_green = tf.cast(tf.equal(green, high), tf.float32) * (1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    blue_low = 2.0 * tf.cast(tf.equal(blue, low), tf.float32) - 1.0
    red_low = 2.0 * tf.cast(tf.equal(red, low), tf.float32) - 1.0
    sign = (is_green - is_red) * blue_low + is_blue * red_low
    base = is_red * blue_low + is_green * (2.0 - blue_low)
    base += is_blue * (4.0 - red_low)
    sixths = tf.cast(base + sign * gap, tf.float64)
    # Pillow's mixture of float64 and float32 decides the cut to a byte.
    turn = sixths / 6.0 + 1.0
    turn = tf.cast(turn - tf.floor(turn), tf.float32)
    hue = tf.cast(tf.cast(turn, tf.float64) * 255.0, tf.int32)
    return hue, saturation, high


def shift_hue(images, shift):
    """Turns the colour circle by whole steps of 1/255.

    Args:
        images: u8[N,H,W,3].
        shift: i32[N], any sign.

    Returns:
        u8[N,H,W,3].

    Source: Pillow, conversion to and from "HSV"; torchvision, `adjust_hue`
    (the hue byte wraps at 256).
    """
    hue, saturation, value = _hue_saturation_value(images)
    # Where all channels are equal the saturation is 0 and hue plays no part.
    hue = tf.bitwise.bitwise_and(hue + tf.reshape(shift, [-1, 1, 1]), 255)
    weights = tf.gather(_HUE_WEIGHTS, hue)  # [N,H,W,3]
    share = saturation / 255.0
    planes = [
        value * (1.0 - share * weight)
        for weight in tf.unstack(weights, num=3, axis=-1)
    ]
    return tf.cast(tf.stack(planes, axis=-1) + 0.5, tf.uint8)
