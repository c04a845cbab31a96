"""Deterministic operations on bytes, each equal to its namesake in Pillow.

All functions take a batch of images first, u8[N,H,W,3] unless stated, and one
parameter per image; all return bytes. They run eagerly, inside `tf.data` and
inside compiled functions. Wide `tf.where` and broadcasts over the three
channels are avoided: on a CPU they cost more than the arithmetic around them.
"""

import math

import numpy as np
import tensorflow as tf

# Luma of ITU-R 601-2 in units of 1/65536, as Pillow has it.
_LUMA = (19595, 38470, 7471)

# Cosine and sine of -d degrees, d in 0..359, rounded as Pillow rounds them.
_ROTATIONS = np.array(
    [
        [round(math.cos(angle), 15), round(math.sin(angle), 15)]
        for angle in [-math.radians(degrees) for degrees in range(360)]
    ]
)  # f64[360,2]


def uniform(seed, *, shape):
    """Uniform numbers in [0, 1), in steps of 2**-23: i32[2] -> f32[shape].

    Made from random bits by hand: the bits of Philox are the same on every
    device and under XLA, TensorFlow's floats are not. Times n and cut off,
    the result is a uniform integer below n.
    """
    bits = tf.random.stateless_uniform(
        shape, seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
    )
    bits = tf.bitwise.right_shift(bits, tf.constant(9, tf.uint32))
    return tf.cast(bits, tf.float32) * 2.0**-23


def _per_image(values, dtype):
    """[N] -> dtype[N,1,1,1], to broadcast against images."""
    return tf.cast(tf.reshape(values, [-1, 1, 1, 1]), dtype)


def _size(images):
    """Height and width of a batch, as integers where they are static."""
    dynamic = tf.shape(images)
    height, width = images.shape[1:3]
    return height or dynamic[1], width or dynamic[2]


def _to_fixed(values):
    return tf.cast(tf.floor(values * 65536.0 + 0.5), tf.int32)


def _source_positions(slope, origin, scaling, count):
    """Source coordinate of each output row or column, as 16.16 fixed point.

    slope, origin f64[N], scaling bool[N] -> i32[N,count].
    """
    line = tf.range(count)[tf.newaxis]  # [1,count]
    slope, origin = slope[:, tf.newaxis], origin[:, tf.newaxis]
    fixed = _to_fixed(origin) + line * _to_fixed(slope)
    # Pillow leaves fixed point when the matrix only scales and shifts.
    exact = tf.floor(origin + tf.cast(line, tf.float64) * slope)
    exact = tf.cast(tf.clip_by_value(exact, -1.0, 32767.0), tf.int32) * 65536
    return tf.where(scaling[:, tf.newaxis], exact, fixed)


def affine_nearest(images, matrices):
    """Affine transform, nearest neighbour, black outside.

    Args:
        images: u8[N,H,W,3].
        matrices: f64[N,6], `(a, b, c, d, e, f)`: the output pixel (x, y) is
            read at (a x + b y + c, d x + e y + f), in pixels.
            Every coordinate must stay below 32768 in magnitude.

    Returns:
        u8[N,H,W,3].

    Source: Pillow, `Image.transform(AFFINE, NEAREST)`, including its 16.16
    fixed point. Pillow sums the steps of a pure scaling one by one; here they
    are multiplied, which differs only where a coordinate falls on a pixel
    edge to within rounding.
    """
    height, width = _size(images)
    matrices = tf.convert_to_tensor(matrices, tf.float64)
    a, b, c, d, e, f = tf.unstack(matrices, num=6, axis=1)  # [N] each
    scaling = tf.logical_and(tf.equal(b, 0.0), tf.equal(d, 0.0))
    columns, rows = tf.range(width), tf.range(height)
    x = _source_positions(a, c + a * 0.5 + b * 0.5, scaling, width)
    y = _source_positions(e, f + d * 0.5 + e * 0.5, scaling, height)
    skew_x = rows * _to_fixed(b)[:, tf.newaxis]  # [N,H]
    skew_y = columns * _to_fixed(d)[:, tf.newaxis]  # [N,W]
    x = x[:, tf.newaxis, :] + skew_x[:, :, tf.newaxis]  # [N,H,W]
    y = y[:, :, tf.newaxis] + skew_y[:, tf.newaxis, :]  # [N,H,W]
    x = tf.clip_by_value(tf.bitwise.right_shift(x, 16), -1, width)
    y = tf.clip_by_value(tf.bitwise.right_shift(y, 16), -1, height)
    # A black frame of one pixel stands for everything outside.
    framed = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]])
    framed = tf.reshape(framed, [-1, (height + 2) * (width + 2), 3])
    index = (y + 1) * (width + 2) + (x + 1)
    return tf.gather(framed, index, batch_dims=1)


def rotate(images, degrees):
    """Rotates counter-clockwise about the centre, keeping the size.

    Args:
        images: u8[N,H,W,3].
        degrees: i32[N], any whole number of degrees.

    Returns:
        u8[N,H,W,3], nearest neighbour, black outside.

    Source: Pillow, `Image.rotate`; its shortcuts for multiples of 90 degrees
    give what the matrix gives.
    """
    height, width = _size(images)
    centre_x = tf.cast(width, tf.float64) / 2.0
    centre_y = tf.cast(height, tf.float64) / 2.0
    turns = tf.gather(_ROTATIONS, tf.math.floormod(degrees, 360))  # [N,2]
    cosine, sine = turns[:, 0], turns[:, 1]
    shift_x = cosine * -centre_x + sine * -centre_y + centre_x
    shift_y = -sine * -centre_x + cosine * -centre_y + centre_y
    matrices = [cosine, sine, shift_x, -sine, cosine, shift_y]
    return affine_nearest(images, tf.stack(matrices, axis=1))


def _planar(images):
    """u8[N,H,W,3] -> i32[N,3,H*W], so that channels are contiguous."""
    planes = tf.transpose(images, [0, 3, 1, 2])
    height, width = _size(images)
    return tf.cast(tf.reshape(planes, [-1, 3, height * width]), tf.int32)


def lookup(images, tables):
    """Replaces each byte by the entry of its channel's table.

    Args:
        images: u8[N,H,W,3].
        tables: u8[N,3,256].

    Returns:
        u8[N,H,W,3].

    Source: Pillow, `Image.point`.
    """
    height, width = _size(images)
    planes = tf.gather(tables, _planar(images), batch_dims=2)
    planes = tf.reshape(planes, [-1, 3, height, width])
    return tf.transpose(planes, [0, 2, 3, 1])


def histogram(images):
    """Counts the values of each channel: u8[N,H,W,3] -> i32[N,3,256].

    Source: Pillow, `Image.histogram`.
    """
    planes = _planar(images)  # [N,3,H*W]
    rows = tf.reshape(planes, [-1, tf.shape(planes)[2]])
    counts = tf.math.bincount(rows, minlength=256, maxlength=256, axis=-1)
    return tf.reshape(counts, [-1, 3, 256])


def blend(first, second, factors):
    """first + factor (second - first), clipped, the fraction cut off.

    Args:
        first: u8 or f32, broadcastable to the images.
        second: u8[N,H,W,3].
        factors: f32[N]; outside [0, 1] it extrapolates.

    Returns:
        u8[N,H,W,3].

    Source: Pillow, `Image.blend`.
    """
    first = tf.cast(first, tf.float32)
    second = tf.cast(second, tf.float32)
    change = _per_image(factors, tf.float32) * (second - first)
    # Clipped before the sum, so that no compiler fuses it with the product:
    # the sum of the rounded product is what Pillow truncates.
    mixed = first + tf.maximum(change, -first)
    return tf.cast(tf.minimum(mixed, 255.0), tf.uint8)


def to_gray(images):
    """Luma of each pixel: u8[N,H,W,3] -> u8[N,H,W,1].

    Source: Pillow, `Image.convert("L")`.
    """
    red, green, blue = tf.unstack(tf.cast(images, tf.int32), num=3, axis=-1)
    luma = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 32768
    luma = tf.cast(tf.bitwise.right_shift(luma, 16), tf.uint8)
    return luma[..., tf.newaxis]


def grayscale(images):
    """Grey images of three equal channels: u8[N,H,W,3] -> u8[N,H,W,3]."""
    return tf.tile(to_gray(images), [1, 1, 1, 3])


def brightness(images, factors):
    """Blends black with the images: u8[N,H,W,3], f32[N] -> u8[N,H,W,3].

    Source: Pillow, `ImageEnhance.Brightness`.
    """
    return blend(tf.zeros([1, 1, 1, 1]), images, factors)


def color(images, factors):
    """Blends the grey images with the images; f32[N] -> u8[N,H,W,3].

    Source: Pillow, `ImageEnhance.Color`.
    """
    return blend(grayscale(images), images, factors)


def contrast(images, factors):
    """Blends each image's mean grey with it; f32[N] -> u8[N,H,W,3].

    Source: Pillow, `ImageEnhance.Contrast`: the mean luma is rounded half up.
    """
    height, width = _size(images)
    luma = tf.cast(to_gray(images), tf.int32)
    total = tf.cast(tf.reduce_sum(luma, axis=[1, 2, 3]), tf.int64)  # [N]
    count = tf.cast(height * width, tf.int64)
    mean = (2 * total + count) // (2 * count)
    return blend(_per_image(mean, tf.float32), images, factors)


def smooth(images):
    """3x3 mean with weight 5 in the centre; the border stays as it is.

    u8[N,H,W,3] -> u8[N,H,W,3].

    Source: Pillow, `ImageFilter.SMOOTH`.
    """
    pixels = tf.cast(images, tf.float32)
    across = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = across[:, :-2] + across[:, 1:-1] + across[:, 2:]
    total += 4.0 * pixels[:, 1:-1, 1:-1]  # [N,H-2,W-2,3]
    # A thirteenth is never half-way between two bytes: float32 is exact.
    inner = tf.cast(total * (1.0 / 13.0) + 0.5, tf.uint8)
    middle = images[:, 1:-1]
    # [:, 1:][:, -1:] is empty for one row, as the result then needs.
    middle = tf.concat(
        [middle[:, :, :1], inner, middle[:, :, 1:][:, :, -1:]], axis=2
    )
    return tf.concat([images[:, :1], middle, images[:, 1:][:, -1:]], axis=1)


def _box_weights(sigma, taps):
    """Weights of one box blur in units of 2**-24: f32[N] -> u32[N,1,1,1] each.

    Entry d of the list weighs the two pixels at distance d. Three such blurs,
    of a fractional radius, approximate a Gaussian. Float32 and float64 are
    mixed as in Pillow.
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
    for distance in range(taps):
        outside = tf.where(tf.equal(distance, radius + 1), edge, 0)
        weight = tf.where(distance <= radius, inside, outside)
        weights.append(_per_image(weight, tf.uint32))
    return weights


def _box_pass(pixels, weights, axis):
    """One box blur of u32[N,H,W,3] along axis 1 or 2, edges replicated."""
    reach = len(weights) - 1
    size = tf.shape(pixels)[axis]

    def window(tensor, begin, length):
        start, shape = [0] * 4, [-1] * 4
        start[axis], shape[axis] = begin, length
        return tf.slice(tensor, start, shape)

    first, last = window(pixels, 0, 1), window(pixels, size - 1, 1)
    padded = tf.concat([first] * reach + [pixels] + [last] * reach, axis)
    total = pixels * weights[0] + tf.constant(2**23, tf.uint32)
    for distance in range(1, reach + 1):
        before = window(padded, reach - distance, size)
        after = window(padded, reach + distance, size)
        total += (before + after) * weights[distance]
    return tf.bitwise.right_shift(total, tf.constant(24, tf.uint32))


def gaussian_blur(images, sigma, *, max_sigma=2.0):
    """Pillow's Gaussian blur: three box blurs per axis, bytes in between.

    Args:
        images: u8[N,H,W,3].
        sigma: f32[N], in pixels, in [0, max_sigma].
        max_sigma: static upper bound of sigma; it decides how many
            neighbours are read.

    Returns:
        u8[N,H,W,3].

    Source: Pillow, `ImageFilter.GaussianBlur`.
    """
    max_radius = int((math.sqrt(4.0 * max_sigma**2 + 1.0) - 1.0) / 2.0)
    weights = _box_weights(tf.cast(sigma, tf.float32), max_radius + 2)
    pixels = tf.cast(images, tf.uint32)
    for axis in (2, 2, 2, 1, 1, 1):
        pixels = _box_pass(pixels, weights, axis)
    return tf.cast(pixels, tf.uint8)
