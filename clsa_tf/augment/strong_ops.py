"""The strong operations: registry `STRONG_OPS`, one entry per operation.

An operation is an affine transform (one matrix per image), a table lookup (one
table per channel), or arithmetic on pixels. Levels are integers in hundredths,
0..1000. The tables below map a level to the operation's own parameter.

Source: maple-research-lab/CLSA@37df76c, data_processing/RandAugment.py. The
operations are Pillow's.
"""

import math
import typing

import numpy as np
import tensorflow as tf

from clsa_tf.augment import primitives

MAX_LEVEL = 10
LEVEL_STEPS = 100  # steps per level

# Entry v is for level v / LEVEL_STEPS.
_LEVELS = np.arange(MAX_LEVEL * LEVEL_STEPS + 1) / LEVEL_STEPS
_FACTOR = (_LEVELS * 0.9 / 10 + 0.05).astype(np.float32)  # .05 .. .95
_BITS = (_LEVELS * 4 / 10).astype(np.int32) + 4
_THRESHOLD = 256 - (_LEVELS * 256 / 10).astype(np.int32)
_DEGREES = _LEVELS * 30 / 10
_SHARE = _LEVELS * 0.3 / 10  # shift per side, or shear in pixels per pixel
# Cosine and sine of the negative angle, rounded as in Pillow.
_TURN = np.array(
    [
        [round(math.cos(angle), 15), round(math.sin(angle), 15)]
        for angle in [-math.radians(degrees) for degrees in _DEGREES]
    ]
)  # f64[1001,2]


# --- affine transforms: f64[N,6], see primitives.source_index ----------------


def _matrix(like, **coefficients):
    """Identity matrices f64[N,6] with some coefficients, f64[N], replaced."""
    zero = tf.zeros_like(like)
    matrix = dict(a=zero + 1, b=zero, c=zero, d=zero, e=zero + 1, f=zero)
    matrix.update(coefficients)
    return tf.stack([matrix[name] for name in "abcdef"], axis=1)


def _rotate(level, sign, height, width):
    """Rotates about the centre; counter-clockwise if the sign is positive."""
    turn = tf.gather(_TURN, level)
    cosine, sine = turn[:, 0], turn[:, 1] * sign
    x, y = width / 2, height / 2
    return _matrix(
        cosine,
        a=cosine,
        b=sine,
        c=cosine * -x + sine * -y + x,
        d=-sine,
        e=cosine,
        f=-sine * -x + cosine * -y + y,
    )


def _shear_x(level, sign, height, width):
    del height, width
    return _matrix(sign, b=tf.gather(_SHARE, level) * sign)


def _shear_y(level, sign, height, width):
    del height, width
    return _matrix(sign, d=tf.gather(_SHARE, level) * sign)


def _pixels(level, side):
    """Whole pixels, truncated."""
    side = tf.cast(side, tf.float64)
    return tf.floor(tf.gather(_SHARE, level) * side)


def _translate_x(level, sign, height, width):
    del height
    return _matrix(sign, c=_pixels(level, width) * sign)


def _translate_y(level, sign, height, width):
    del width
    return _matrix(sign, f=_pixels(level, height) * sign)


# --- tables: u8[N,3,256], see primitives.lookup -----------------------------

_VALUES = np.arange(256)[np.newaxis, np.newaxis]  # [1,1,256]


def _auto_contrast(images, level):
    del level
    low = tf.cast(tf.reduce_min(images, axis=[2, 3]), tf.float64)  # [N,3]
    high = tf.cast(tf.reduce_max(images, axis=[2, 3]), tf.float64)
    low, high = low[..., tf.newaxis], high[..., tf.newaxis]
    values = _VALUES.astype(np.float64)
    scale = 255.0 / tf.maximum(high - low, 1.0)
    # As in Pillow, float64 and two rounded products decide the truncation. The
    # ReLUs change no value: they keep compilers from fusing product and sum.
    tables = tf.nn.relu(values * scale) - tf.nn.relu(low * scale)
    tables = tf.clip_by_value(tables, 0.0, 255.0)
    return tf.cast(tf.where(tf.equal(low, high), values, tables), tf.uint8)


def _equalize(images, level):
    del level
    counts = primitives.histogram(images)  # i32[N,3,256]
    below = tf.cumsum(counts, axis=-1, exclusive=True)
    # The pixels darker than the lightest value present, divided into 255 steps.
    darker = tf.reduce_max(below * tf.sign(counts), axis=-1, keepdims=True)
    step = darker // 255
    flat = tf.equal(step, 0)
    tables = (step // 2 + below) // tf.where(flat, 1, step)
    tables = tf.where(flat, _VALUES.astype(np.int32), tf.minimum(tables, 255))
    return tf.cast(tables, tf.uint8)


# --- arithmetic: u8[N,3,H,W] -------------------------------------------------


def _brightness(images, level):
    return primitives.brightness(images, tf.gather(_FACTOR, level))


def _color(images, level):
    return primitives.color(images, tf.gather(_FACTOR, level))


def _contrast(images, level):
    return primitives.contrast(images, tf.gather(_FACTOR, level))


def _sharpness(images, level):
    smoothed = primitives.smooth(images)
    return primitives.blend(smoothed, images, tf.gather(_FACTOR, level))


def _invert(images, level):
    del level
    return 255 - images


def _posterize(images, level):
    masks = (256 - 2 ** (8 - _BITS)).astype(np.uint8)
    mask = primitives.per_image(tf.gather(masks, level))
    return tf.bitwise.bitwise_and(images, mask)


def _solarize(images, level):
    threshold = primitives.per_image(tf.gather(_THRESHOLD, level))
    # A threshold of 256 inverts no pixel.
    light = tf.cast(images, tf.int32) >= threshold
    return tf.where(light, 255 - images, images)


# --- the registry ------------------------------------------------------------

AFFINE, TABLE, ARITHMETIC = "affine", "table", "arithmetic"


class Op(typing.NamedTuple):
    """A strong operation.

    Attributes:
        kind: "affine", "table", "arithmetic", or "" for the identity.
        function: computes, according to `kind`,
            "affine": matrices f64[N,6] from (level i32[N], sign f64[N], height,
            width);
            "table": tables u8[N,3,256] from (images u8[N,3,H,W], level);
            "arithmetic": images u8[N,3,H,W] from (images, level).
        parameter: function of (level, sign) that formats the operation's own
            parameter for captions; None if the operation has no level.
        pools: names of the pools that contain it.
    """

    kind: str
    function: typing.Optional[typing.Callable] = None
    parameter: typing.Optional[typing.Callable] = None
    pools: typing.Tuple[str, ...] = ("released", "paper")


def _degrees(level, sign):
    return f"{sign * _DEGREES[level]:+.4g}°"


def _shear(level, sign):
    return f"{sign * _SHARE[level]:+.2f}"


def _shift(level, sign):
    return f"{100 * sign * _SHARE[level]:+.0f}%"


def _factor(level, sign):
    del sign
    return f"{_FACTOR[level]:.2f}"


STRONG_OPS = {
    "AutoContrast": Op(TABLE, _auto_contrast),
    "Brightness": Op(ARITHMETIC, _brightness, _factor),
    "Color": Op(ARITHMETIC, _color, _factor),
    "Contrast": Op(ARITHMETIC, _contrast, _factor),
    "Equalize": Op(TABLE, _equalize),
    # The paper's table has Invert in place of the released code's Identity.
    "Identity": Op("", pools=("released",)),
    "Invert": Op(ARITHMETIC, _invert, pools=("paper",)),
    "Posterize": Op(
        ARITHMETIC, _posterize, lambda level, _: f"{_BITS[level]} bits"
    ),
    "Rotate": Op(AFFINE, _rotate, _degrees),
    "Sharpness": Op(ARITHMETIC, _sharpness, _factor),
    "ShearX": Op(AFFINE, _shear_x, _shear),
    "ShearY": Op(AFFINE, _shear_y, _shear),
    "Solarize": Op(
        ARITHMETIC, _solarize, lambda level, _: f"{_THRESHOLD[level]}"
    ),
    "TranslateX": Op(AFFINE, _translate_x, _shift),
    "TranslateY": Op(AFFINE, _translate_y, _shift),
}
