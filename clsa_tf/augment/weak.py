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
from clsa_tf.augment.blur import MAX_SIGMA, blur_and_transpose
from clsa_tf.augment.hue import shift_hue

JITTERS = ("brightness", "contrast", "saturation", "hue")
_CENTRES = np.array([1.0, 1.0, 1.0, 0.0], np.float32)
_SPREADS = np.array([0.4, 0.4, 0.4, 0.1], np.float32)
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)  # [24,4]
_MIN_SIGMA = 0.1  # pixels

# Uniform numbers that each part of the chain is drawn from.
NEEDS = {"jitter": 6, "gray": 1, "blur": 2, "flip": 1}
# What `draw` returns.
SPECS = {
    "jitter": tf.TensorSpec([], tf.bool),
    "factors": tf.TensorSpec([4], tf.float32),
    "order": tf.TensorSpec([4], tf.int32),
    "gray": tf.TensorSpec([], tf.bool),
    "blur": tf.TensorSpec([], tf.bool),
    "sigma": tf.TensorSpec([], tf.float32),
    "flip": tf.TensorSpec([], tf.bool),
}


def draw(jitter, gray, blur, flip, *, blur_probability=0.5):
    """Draws the parameters of one weak view.

    Args:
        jitter: f32[6], uniform numbers in [0, 1).
        gray: f32[1], likewise.
        blur: f32[2], likewise.
        flip: f32[1], likewise.
        blur_probability: of the Gaussian blur, in [0, 1].

    Returns:
        dict of scalars unless stated: `jitter` bool, p 0.8; `factors` f32[4]
        in the order of `JITTERS`, the first three in [0.6, 1.4], hue in
        [-0.1, 0.1] of the colour circle; `order` i32[4], indices into
        `JITTERS`; `gray` bool, p 0.2; `blur` bool; `sigma` f32 in
        [0.1, 2.0], pixels; `flip` bool, p 0.5.
    """
    return {
        "jitter": jitter[0] < 0.8,
        "factors": _CENTRES + _SPREADS * (2.0 * jitter[2:] - 1.0),
        "order": tf.gather(_ORDERS, tf.cast(jitter[1] * 24, tf.int32)),
        "gray": gray[0] < 0.2,
        "blur": blur[0] < blur_probability,
        "sigma": _MIN_SIGMA + (MAX_SIGMA - _MIN_SIGMA) * blur[1],
        "flip": flip[0] < 0.5,
    }


def apply(images, params):
    """Executes drawn weak chains, and turns the images upright.

    Args:
        images: u8[N,3,W,H], transposed, as crops come.
        params: what `draw` returns, with a leading axis N.

    Returns:
        u8[N,3,H,W].
    """
    images = _jitter(images, params)
    for name, without, step in (
        ("gray", tf.identity, primitives.grayscale),
        (
            "blur",
            lambda x: tf.transpose(x, [0, 1, 3, 2]),
            lambda x: blur_and_transpose(x, params["sigma"]),
        ),
        ("flip", tf.identity, lambda x: tf.reverse(x, axis=[3])),
    ):
        images = primitives.choose(
            tf.cast(params[name], tf.int32),
            [lambda f=f, x=images: f(x) for f in (without, step)],
        )
    return images


def _jitter(images, params):
    """The four colour changes, each image's in its own order."""

    def step(i, images):
        change = tf.gather(params["order"], i, axis=1)  # i32[N]
        factors = tf.gather(params["factors"], change, batch_dims=1)  # [N]
        # int() of Python cuts towards zero; the product is taken in float64.
        shift = tf.cast(tf.cast(factors, tf.float64) * 255.0, tf.int32)
        result = primitives.choose(
            tf.where(params["jitter"], 1 + change, 0),
            [
                lambda: images,
                lambda: primitives.brightness(images, factors),
                lambda: primitives.contrast(images, factors),
                lambda: primitives.color(images, factors),
                lambda: shift_hue(images, shift),
            ],
        )
        return i + 1, tf.ensure_shape(result, images.shape)

    steps = len(JITTERS) * tf.reduce_max(tf.cast(params["jitter"], tf.int32))
    loop = (lambda i, _: i < steps), step, (0, images)
    return tf.while_loop(*loop)[1]
