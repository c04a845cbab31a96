"""Texture randomisation: a random convolution, mixed with the original."""

import itertools

import tensorflow as tf

# Weights are integers in units of 1/64. With so few bits every sum below is
# exact in float32, in any order.
UNIT = 64
# The nine kernel values are drawn from -_REACH.._REACH units.
_REACH = UNIT
_CENTRE = 4  # index of the kernel's centre

# Uniform random numbers per texture.
NUM_UNIFORMS = 11
# The result of `draw`.
SPECS = {
    "apply": tf.TensorSpec([], tf.bool),
    "kernel": tf.TensorSpec([9], tf.int32),
    "alpha": tf.TensorSpec([], tf.int32),
}


def draw(uniform, *, probability):
    """Draws the parameters of one view's texture.

    Args:
        uniform: f32[11], uniform numbers in [0, 1).
        probability: probability of a texture, in [0, 1].

    Returns:
        dict of

        * `apply` bool;
        * `kernel` i32[9], 3x3 in row-major order, in units of 1/64: uniform
          numbers in [-1, 1], shifted by a common amount so that their sum is 1
          (64 units). The centre gets the remainder of that division.
        * `alpha` i32, weight of the original image, uniform in 0..64 units.
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
    """Mixes images with their random convolutions, rounds half up and clips.

    One kernel of sum 1 convolves all three channels, borders replicated. Areas
    of one colour do not change, shapes and colours remain, and fine structure
    changes.

    Args:
        images: u8[N,3,W,H], transposed.
        params: result of `draw`, with a leading axis N; `apply` is ignored.

    Returns:
        u8[N,3,W,H].

    Source: Xu et al., arXiv 2007.13003 (RandConv, mixing variant). Differences:
    RandConv's kernels mix the channels, which changes colours; their values are
    Gaussian and do not sum to 1; their side is drawn from 1, 3, 5, 7.
    """
    kernel = tf.cast(params["kernel"], tf.float32)  # [N,9]
    alpha = tf.cast(params["alpha"], tf.float32)[:, tf.newaxis]  # [N,1]
    # Weights of sum 1, in units of 1/64**2.
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
