"""Deterministic operations on bytes, bit-identical to Pillow's.

Images are planar, u8[N,3,H,W]: a row of one channel is contiguous, so
arithmetic on channels is vectorised. Each image has its own parameter. All
functions run eagerly, inside `tf.data` and under XLA on any device, with
bit-identical results. Where the order of float operations decides how a
fraction is truncated, it is Pillow's order.
"""

import itertools

import numpy as np
import tensorflow as tf

# Luma weights of ITU-R 601-2 in units of 1/65536, as in Pillow.
_LUMA = (19595, 38470, 7471)


def uniform(seed, *, shape):
    """Uniform numbers in [0, 1), in steps of 2**-23: i32[2] -> f32[shape].

    They are converted from random bits: the bits of Philox are the same on
    every device and under XLA, TensorFlow's uniform floats are not. Multiplied
    by n and truncated, they are uniform integers below n.
    """
    bits = tf.random.stateless_uniform(
        shape, seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
    )
    bits = tf.bitwise.right_shift(bits, tf.constant(9, tf.uint32))
    return tf.cast(bits, tf.float32) * 2.0**-23


def choose(index, branches):
    """Selects for each image the result of one branch.

    With one image only its branch runs, which suits hosts. With several, all
    branches run and each image keeps one result, which suits accelerators.

    Args:
        index: i32[N], the branch of each image. N = 1 is detected while
            tracing.
        branches: functions without arguments. Each returns a tensor [N,...],
            all of one shape and dtype.

    Returns:
        [N,...], row n from `branches[index[n]]`.
    """
    if index.shape[0] == 1:
        return tf.switch_case(index[0], branches)
    chosen = branches[0]()
    for number, branch in enumerate(branches[1:], start=1):
        mask = per_image(tf.equal(index, number), rank=chosen.shape.rank)
        chosen = tf.where(mask, branch(), chosen)
    return chosen


def per_image(values, *, rank=4):
    """Reshapes [N] to [N,1,...,1] of `rank`, to broadcast over images."""
    return tf.reshape(values, [-1] + [1] * (rank - 1))


def size(images):
    """Height and width of u8[N,3,H,W]; integers if they are static."""
    dynamic = tf.shape(images)
    height, width = images.shape[2:]
    return height or dynamic[2], width or dynamic[3]


def source_index(matrices, *, height, width):
    """Source pixel of each output pixel of an affine transform.

    Args:
        matrices: f64[N,6], `(a, b, c, d, e, f)`. The output pixel (x, y) is
            read at (a x + b y + c, d x + e y + f), in pixels. Coordinates have
            to be below 32768 in magnitude.
        height: height of the images in pixels.
        width: width of the images in pixels.

    Returns:
        i32[N,H,W], y * W + x of the nearest source pixel; -1 if it is outside.

    Source: Pillow, `Image.transform(AFFINE, NEAREST)`, including its 16.16
    fixed point. (Pillow does not use fixed point for a pure scaling. No
    operation here scales, and for shifts by whole pixels both agree.)
    """
    a, b, c, d, e, f = tf.unstack(matrices, num=6, axis=1)  # f64[N] each

    def position(across, down, origin):
        origin += 0.5 * across + 0.5 * down
        steps = tf.stack([across, down, origin], axis=1)  # [N,3]
        steps = tf.cast(tf.floor(steps * 65536.0 + 0.5), tf.int32)
        across, down, origin = (
            tf.reshape(x, [-1, 1, 1]) for x in tf.unstack(steps, num=3, axis=1)
        )
        rows = tf.range(height)[:, tf.newaxis]  # [H,1]
        fixed = origin + down * rows + across * tf.range(width)
        return tf.bitwise.right_shift(fixed, 16)  # [N,H,W]

    x, y = position(a, b, c), position(d, e, f)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return tf.where(inside, y * width + x, -1)


def take(images, index):
    """Gathers pixels; the result is black where the index is -1.

    Args:
        images: u8[N,3,H,W].
        index: i32[N,H,W], y * W + x of the pixel to take, or -1.

    Returns:
        u8[N,3,H,W].
    """
    height, width = size(images)
    pixels = tf.gather(
        tf.reshape(images, [-1, 3, height * width]),
        tf.reshape(tf.maximum(index, 0), [-1, height * width]),
        axis=2,
        batch_dims=1,
    )  # [N,3,H*W]
    inside = tf.cast(index >= 0, tf.uint8)[:, tf.newaxis]
    return tf.reshape(pixels, tf.shape(images)) * inside


def lookup(images, tables):
    """Replaces each byte by the entry of its channel's table.

    Args:
        images: u8[N,3,H,W].
        tables: u8[N,3,256].

    Returns:
        u8[N,3,H,W].

    Source: Pillow, `Image.point`.
    """
    height, width = size(images)
    values = tf.reshape(images, [-1, 3, height * width])
    values = tf.gather(tables, tf.cast(values, tf.int32), batch_dims=2)
    return tf.reshape(values, tf.shape(images))


def histogram(images):
    """Histogram of each channel: u8[N,3,H,W] -> i32[N,3,256].

    Incrementing counters, as `tf.math.bincount` does, takes XLA on a CPU
    microseconds per pixel. Therefore 32 pixels are processed at a time: a word
    holds one bit of each pixel, and the pixels with a given value are the
    bitwise AND of eight words. (64-bit words are a fifth faster on CPUs, but
    TPUs emulate them.)

    Source: Pillow, `Image.histogram`.
    """
    height, width = size(images)
    missing = -height * width % 32
    words = (height * width + missing) // 32
    pixels = tf.reshape(images, [-1, 3, height * width])
    pixels = tf.pad(pixels, [[0, 0], [0, 0], [0, missing]])
    pixels = tf.reshape(pixels, [-1, 3, 8, words * 4])

    def bit_plane(bit):
        """Bit `bit` of all pixels, packed into u32[N,3,words], in any order."""
        bits = tf.bitwise.right_shift(pixels, tf.constant(bit, tf.uint8))
        bits = tf.bitwise.bitwise_and(bits, tf.constant(1, tf.uint8))
        columns = tf.unstack(bits, num=8, axis=2)
        packed = columns[0]
        for place, column in enumerate(columns[1:], start=1):
            column = tf.bitwise.left_shift(column, tf.constant(place, tf.uint8))
            packed = tf.bitwise.bitwise_or(packed, column)
        return tf.bitcast(tf.reshape(packed, [-1, 3, words, 4]), tf.uint32)

    def halves(planes):
        """Pixels with each value of a half byte, as bits: u32[N,3,16,words]."""
        found = tf.constant(tf.uint32.max, tf.uint32)
        for place, plane in enumerate(planes):
            ones = np.arange(16, dtype=np.uint32) >> place & 1
            flip = (ones - 1)[:, np.newaxis]  # [16,1], all bits or none
            same = tf.bitwise.bitwise_xor(plane[:, :, tf.newaxis], flip)
            found = tf.bitwise.bitwise_and(found, same)
        return found

    planes = [bit_plane(bit) for bit in range(8)]
    low, high = halves(planes[:4]), halves(planes[4:])
    found = tf.bitwise.bitwise_and(
        high[:, :, :, tf.newaxis], low[:, :, tf.newaxis]
    )  # [N,3,16,16,words]
    counts = tf.cast(tf.raw_ops.PopulationCount(x=found), tf.int32)
    counts = tf.reshape(tf.reduce_sum(counts, axis=-1), [-1, 3, 256])
    return counts - missing * tf.one_hot(0, 256, dtype=tf.int32)


def blend(first, second, factors):
    """Blends two images: first + factor (second - first), clipped, truncated.

    Args:
        first: u8, i32 or f32, broadcastable to `second`.
        second: u8[N,...].
        factors: f32[N]; values outside [0, 1] extrapolate.

    Returns:
        u8, of the shape of `second`.

    Source: Pillow, `Image.blend`.
    """
    first = tf.cast(first, tf.float32)
    second = tf.cast(second, tf.float32)
    factors = per_image(factors, rank=second.shape.rank)
    # Pillow truncates the sum of the rounded product. The maximum in between
    # prevents compilers from fusing product and sum.
    mixed = first + tf.maximum(factors * (second - first), -first)
    return tf.cast(tf.minimum(mixed, 255.0), tf.uint8)


def luma(images):
    """Grey value of each pixel: u8[N,3,H,W] -> i32[N,1,H,W], in 0..255.

    Source: Pillow, `Image.convert("L")`.
    """
    planes = tf.cast(images, tf.int32)
    red, green, blue = planes[:, 0:1], planes[:, 1:2], planes[:, 2:3]
    total = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 32768
    return tf.bitwise.right_shift(total, 16)


def mean_luma(images):
    """Mean grey value of each image, rounded half up: u8[N,3,H,W] -> i32[N].

    Images may have up to four million pixels (sums are int32).

    Source: Pillow, `ImageEnhance.Contrast`.
    """
    height, width = size(images)
    total = tf.reduce_sum(luma(images), axis=[1, 2, 3])  # i32[N]
    return (2 * total + height * width) // (2 * height * width)


def grayscale(images):
    """Greyscale with three equal channels: u8[N,3,H,W] -> u8[N,3,H,W]."""
    return tf.tile(tf.cast(luma(images), tf.uint8), [1, 3, 1, 1])


def brightness(images, factors):
    """Blends each image with black: u8[N,3,H,W], f32[N] -> u8[N,3,H,W].

    Source: Pillow, `ImageEnhance.Brightness`.
    """
    return blend(0.0, images, factors)


def color(images, factors):
    """Blends each image with its greyscale; f32[N] -> u8[N,3,H,W].

    Source: Pillow, `ImageEnhance.Color`.
    """
    return blend(luma(images), images, factors)


def contrast(images, factors):
    """Blends each image with its mean grey; f32[N] -> u8[N,3,H,W].

    Source: Pillow, `ImageEnhance.Contrast`.
    """
    return blend(per_image(mean_luma(images)), images, factors)


def solarize(images):
    """Inverts all bytes of at least 128: u8[N,3,H,W] -> u8[N,3,H,W].

    Source: Pillow, `ImageOps.solarize(threshold=128)`.
    """
    # Of a byte and its complement exactly one is below 128.
    return tf.minimum(images, 255 - images)


def smooth(images):
    """3x3 mean with weight 5 in the centre; border pixels do not change.

    u8[N,3,H,W] -> u8[N,3,H,W].

    Source: Pillow, `ImageFilter.SMOOTH`.
    """
    height, width = size(images)
    # A neighbour is an offset in the flattened plane. At the border this reads
    # wrong pixels, and `margin` pixels at both ends have no neighbours; the
    # mask below discards these.
    flat = tf.cast(tf.reshape(images, [-1, 3, height * width]), tf.float32)
    margin = tf.minimum(width + 1, height * width)
    count = tf.maximum(height * width - 2 * margin, 0)

    def shifted(rows, columns):
        begin = margin + rows * width + columns
        return flat[:, :, begin : begin + count]

    total = 4.0 * shifted(0, 0)
    for row, column in itertools.product((-1, 0, 1), (-1, 0, 1)):
        total += shifted(row, column)
    # Multiples of 1/13 are never half-way between two bytes, so float32 rounds
    # them correctly.
    smoothed = tf.cast(total * (1.0 / 13.0) + 0.5, tf.uint8)
    after = height * width - margin - count
    smoothed = tf.pad(smoothed, [[0, 0], [0, 0], [margin, after]])
    smoothed = tf.reshape(smoothed, tf.shape(images))
    rows, columns = tf.range(height), tf.range(width)
    inner_rows = (rows > 0) & (rows < height - 1)
    inner_columns = (columns > 0) & (columns < width - 1)
    inner = inner_rows[:, tf.newaxis] & inner_columns  # [H,W]
    return tf.where(inner, smoothed, images)
