"""The weak augmentation after the crop, on bytes.

MoCo v2's and CLSA's chain is colour jitter, greyscale, Gaussian blur and
horizontal flip, in this order. A view may enable more parts (see `apply`).
`draw` draws the parameters, `apply` executes them. Operations that exist in
Pillow or torchvision give the same bytes as there.

Source: maple-research-lab/CLSA@37df76c, data_processing/Multi_FixTransform.py;
torchvision, `ColorJitter`.
"""

import itertools

import numpy as np
import tensorflow as tf

from clsa_tf.augment import primitives, texture
from clsa_tf.augment.blur import MAX_SIGMA, blur_and_transpose
from clsa_tf.augment.hue import shift_hue

JITTERS = ("brightness", "contrast", "saturation", "hue")
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)  # [24,4]
_MIN_SIGMA = 0.1  # pixels

# Parts that are off unless a view enables them.
_OPTIONAL = ("rotation", "texture", "solarize")
# Uniform random numbers per part of the chain.
_NUM_UNIFORMS = {
    "jitter": 6,
    "gray": 1,
    "blur": 2,
    "flip": 1,
    "rotation": 1,
    "texture": texture.NUM_UNIFORMS,
    "solarize": 1,
}
# The result of `draw`. An optional part is one entry with its name.
_SPECS = {
    "jitter": tf.TensorSpec([], tf.bool),
    "factors": tf.TensorSpec([4], tf.float32),
    "order": tf.TensorSpec([4], tf.int32),
    "gray": tf.TensorSpec([], tf.bool),
    "blur": tf.TensorSpec([], tf.bool),
    "sigma": tf.TensorSpec([], tf.float32),
    "flip": tf.TensorSpec([], tf.bool),
    "rotation": tf.TensorSpec([], tf.int32),
    "texture": texture.SPECS,
    "solarize": tf.TensorSpec([], tf.bool),
}


def _lacks(view, name):
    return name in _OPTIONAL and not getattr(view, name)


def num_uniforms(view):
    """Count of uniform random numbers per part; 0 for parts that are off."""
    return {k: 0 if _lacks(view, k) else n for k, n in _NUM_UNIFORMS.items()}


def specs(view):
    """`TensorSpec`s of the result of `draw` for a `View`."""
    return {k: spec for k, spec in _SPECS.items() if not _lacks(view, k)}


def draw(numbers, view):
    """Draws the parameters of one weak view.

    Args:
        numbers: dict, part -> uniform numbers f32[n] in [0, 1), n as in
            `num_uniforms`.
        view: `views.View` with the probabilities and strengths.

    Returns:
        dict of scalars, except where a shape is given:

        * `jitter` bool;
        * `factors` f32[4] in the order of `JITTERS`: three factors in
          [max(0, 1 - strength), 1 + strength], and the hue shift in
          [-strength, strength] of the colour circle;
        * `order` i32[4], indices into `JITTERS`;
        * `gray` bool;
        * `blur` bool;
        * `sigma` f32 in [0.1, 2.0], pixels;
        * `flip` bool;

        and, if the view enables them,

        * `rotation` i32, counter-clockwise quarter turns in 0..3;
        * `texture`, a dict, see `texture.draw`;
        * `solarize` bool.
    """
    jitter, blur = numbers["jitter"], numbers["blur"]
    *factors, hue = view.jitter
    halves = [(1.0 + s) / 2.0 for s in factors]  # for ranges clipped at 0
    centres = [max(1.0, half) for half in halves] + [0.0]
    spreads = [min(s, half) for s, half in zip(factors, halves)] + [hue]
    params = {
        "jitter": jitter[0] < view.jitter_probability,
        "factors": np.float32(centres)
        + np.float32(spreads) * (2.0 * jitter[2:] - 1.0),
        "order": tf.gather(_ORDERS, tf.cast(jitter[1] * 24, tf.int32)),
        "gray": numbers["gray"][0] < view.gray,
        "blur": blur[0] < view.blur,
        "sigma": _MIN_SIGMA + (MAX_SIGMA - _MIN_SIGMA) * blur[1],
        "flip": numbers["flip"][0] < view.flip,
    }
    if view.rotation:
        params["rotation"] = tf.cast(numbers["rotation"][0] * 4, tf.int32)
    if view.texture:
        params["texture"] = texture.draw(
            numbers["texture"], probability=view.texture
        )
    if view.solarize:
        params["solarize"] = numbers["solarize"][0] < view.solarize
    return params


def apply(images, params, *, gray_first=False):
    """Executes drawn weak chains, and undoes the transposition of the crops.

    The order is rotation, jitter, greyscale, texture, blur, solarisation, flip.

    Args:
        images: u8[N,3,W,H], transposed, as crops are; square for a rotation.
        params: result of `draw`, with a leading axis N.
        gray_first: whether greyscale precedes the jitter, as in MoCo v1.

    Returns:
        u8[N,3,H,W].
    """
    if "rotation" in params:
        images = _rotate(images, params["rotation"])
    if gray_first:
        images = _if(params["gray"], primitives.grayscale, images)
    images = _jitter(images, params)
    if not gray_first:
        images = _if(params["gray"], primitives.grayscale, images)
    if "texture" in params:
        drawn = params["texture"]
        images = _if(
            drawn["apply"], lambda x: texture.randomize(x, drawn), images
        )
    images = primitives.choose(
        tf.cast(params["blur"], tf.int32),
        [
            lambda: _transpose(images),
            lambda: blur_and_transpose(images, params["sigma"]),
        ],
    )
    if "solarize" in params:
        images = _if(params["solarize"], primitives.solarize, images)
    return _if(params["flip"], lambda x: tf.reverse(x, axis=[3]), images)


def _if(flags, step, images):
    """Applies `step` to the images whose flag, bool[N], is set."""
    return primitives.choose(
        tf.cast(flags, tf.int32), [lambda: images, lambda: step(images)]
    )


def _transpose(images):
    return tf.transpose(images, [0, 1, 3, 2])


def _rotate(images, turns):
    """Rotates images, stored transposed, by quarter turns i32[N] in 0..3.

    Source: Pillow, `Image.transpose(ROTATE_90)` and so on.
    """
    return primitives.choose(
        turns,
        [
            lambda: images,
            lambda: tf.reverse(_transpose(images), axis=[3]),
            lambda: tf.reverse(images, axis=[2, 3]),
            lambda: tf.reverse(_transpose(images), axis=[2]),
        ],
    )


def _jitter(images, params):
    """Colour jitter: four changes, in an order of its own per image."""

    def step(i, images):
        change = tf.gather(params["order"], i, axis=1)  # i32[N]
        factors = tf.gather(params["factors"], change, batch_dims=1)  # [N]
        # As Python's int(): a float64 product, truncated towards zero.
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


def describe(params):
    """Describes the effect of optional parts, such as `"rotation 90°"`.

    Args:
        params: result of `draw`, with concrete values.

    Returns:
        list of str in the order of execution; empty if no part had an effect.
    """
    words = []
    if params.get("rotation"):
        words.append(f"rotation {90 * params['rotation']}°")
    if "texture" in params and params["texture"]["apply"]:
        share = 1 - params["texture"]["alpha"] / texture.UNIT
        words.append(f"texture {100 * share:.0f}%")
    if params.get("solarize"):
        words.append("solarized")
    return words
