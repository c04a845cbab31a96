"""Texture randomisation: a random convolution, mixed with the original."""

import itertools

import tensorflow as tf

# Whole numbers of 1/64: with a weight of so few bits every sum below is exact
# in float32, in whatever order it is taken.
UNIT = 64
# A kernel's nine numbers are drawn within so many units of their mean's.
_REACH = UNIT
_CENTRE = 4  # of the kernel's nine

# Uniform numbers that a texture is drawn from.
NUM_UNIFORMS = 11
# What `draw` returns.
SPECS = {
    "apply": tf.TensorSpec([], tf.bool),
    "kernel": tf.TensorSpec([9], tf.int32),
    "alpha": tf.TensorSpec([], tf.int32),
}


def draw(uniform, *, probability):
    """Draws the parameters of one view's texture.

    Args:
        uniform: f32[11], uniform numbers in [0, 1).
        probability: of a change, in [0, 1].

    Returns:
        dict of `apply` bool; `kernel` i32[9], 3x3 row by row, in units of
        1/64: uniform numbers in [-1, 1], all moved by the same amount (but
        for a remainder of units, which the centre takes) so that their sum is
        64 units, or 1; `alpha` i32, weight of the original, uniform in
        0..64 units.
    """
    steps = 2 * _REACH + 1
    kernel = tf.cast(uniform[2:] * steps, tf.int32) - _REACH
    missing = UNIT - tf.reduce_sum(kernel)
    rest = tf.one_hot(_CENTRE, 9, dtype=tf.int32) * (missing % 9)
    return {
        "apply": uniform[0] < probability,
        "kernel": kernel + missing // 9 + rest,
        "alpha": tf.cast(uniform[1] * (UNIT + 1), tf.int32),
    }


def randomize(images, params):
    """Mixes images with their convolutions, rounds half up and clips.

    The three channels are convolved with the same kernel, whose sum is 1, the
    borders replicated: a surface of one colour stays as it is, shapes and
    colours remain, and fine structure changes.

    Args:
        images: u8[N,3,W,H], transposed.
        params: what `draw` returns, with a leading axis N; `apply` is not
            looked at.

    Returns:
        u8[N,3,W,H].

    Source: Xu et al., arXiv 2007.13003 (RandConv, mixing variant). It differs
    in this: there a kernel mixes the channels, which changes colours, its
    numbers are Gaussian and do not add up to 1, and its side is drawn from 1,
    3, 5, 7.
    """
    kernel = tf.cast(params["kernel"], tf.float32)  # [N,9]
    alpha = tf.cast(params["alpha"], tf.float32)[:, tf.newaxis]  # [N,1]
    # Of sum 1, in units of 1/64**2.
    weights = (UNIT - alpha) * kernel + alpha * UNIT * tf.one_hot(_CENTRE, 9)
    weights = tf.reshape(weights, [-1, 9, 1, 1, 1])
    pixels = tf.pad(images, [[0, 0], [0, 0], [1, 1], [1, 1]], mode="SYMMETRIC")
    pixels = tf.cast(pixels, tf.float32)
    width, height = images.shape[2:]
    total = 0.0
    for i, (y, x) in enumerate(itertools.product(range(3), range(3))):
        near = pixels[:, :, x : x + width, y : y + height]
        total += weights[:, i] * near
    total = tf.clip_by_value(total / UNIT**2 + 0.5, 0.0, 255.0)
    return tf.cast(total, tf.uint8)
