"""CLSA's strong augmentation: a random sequence of 14 operations on bytes.

`draw` decides, `apply` executes; the operations themselves are deterministic
and batched, `op(images u8[N,H,W,3], level i32[N], sign i32[N]) -> u8`. A level
is a whole number in 1..9; the tables below turn it into the operation's own
parameter. Source: maple-research-lab/CLSA@37df76c, data_processing/
RandAugment.py, the pool that the released code runs; the operations are
Pillow's.
"""

import numpy as np
import tensorflow as tf

from clsa_tf.augment import primitives

MAX_LEVEL = 9  # the released code draws below its nominal maximum of 10

# Entry v belongs to level v; entry 0 is there to keep the index plain.
_LEVELS = np.arange(MAX_LEVEL + 1)
_FACTOR = (_LEVELS * 0.9 / 10 + 0.05).astype(np.float32)  # .05 .. .86
_BITS = (_LEVELS * 4 / 10).astype(np.int32) + 4
_THRESHOLD = 256 - (_LEVELS * 256 / 10).astype(np.int32)
_DEGREES = (_LEVELS * 30 / 10).astype(np.int32)
_SHARE = _LEVELS * 0.3 / 10  # f64, of the side or of a pixel per pixel


def _auto_contrast(images, level, sign):
    del level, sign
    low = tf.cast(tf.reduce_min(images, axis=[1, 2]), tf.float64)  # [N,3]
    high = tf.cast(tf.reduce_max(images, axis=[1, 2]), tf.float64)
    low, high = low[..., tf.newaxis], high[..., tf.newaxis]
    values = tf.range(256, dtype=tf.float64)
    flat = tf.equal(low, high)
    scale = 255.0 / tf.maximum(high - low, 1.0)
    # float64 and two rounded products decide where fractions are cut. The
    # maximum, idle otherwise, keeps compilers from fusing product and sum.
    tables = tf.nn.relu(values * scale) - tf.nn.relu(low * scale)
    tables = tf.where(flat, values, tf.clip_by_value(tables, 0.0, 255.0))
    tables = tf.cast(tables, tf.uint8)
    return primitives.lookup(images, tables)


def _brightness(images, level, sign):
    del sign
    return primitives.brightness(images, tf.gather(_FACTOR, level))


def _color(images, level, sign):
    del sign
    return primitives.color(images, tf.gather(_FACTOR, level))


def _contrast(images, level, sign):
    del sign
    return primitives.contrast(images, tf.gather(_FACTOR, level))


def _equalize(images, level, sign):
    del level, sign
    counts = primitives.histogram(images)  # i32[N,3,256]
    below = tf.cumsum(counts, axis=-1, exclusive=True)
    # Pixels darker than the lightest value present, in 255 equal steps.
    darker = tf.reduce_max(below * tf.sign(counts), axis=-1, keepdims=True)
    step = darker // 255
    flat = tf.equal(step, 0)
    tables = (step // 2 + below) // tf.where(flat, 1, step)
    tables = tf.where(flat, tf.range(256), tf.minimum(tables, 255))
    return primitives.lookup(images, tf.cast(tables, tf.uint8))


def _identity(images, level, sign):
    del level, sign
    return images


def _posterize(images, level, sign):
    del sign
    masks = (256 - 2 ** (8 - _BITS)).astype(np.uint8)
    mask = tf.reshape(tf.gather(masks, level), [-1, 1, 1, 1])
    return tf.bitwise.bitwise_and(images, mask)


def _rotate(images, level, sign):
    return primitives.rotate(images, sign * tf.gather(_DEGREES, level))


def _sharpness(images, level, sign):
    del sign
    smoothed = primitives.smooth(images)
    return primitives.blend(smoothed, images, tf.gather(_FACTOR, level))


def _signed_share(level, sign):
    return tf.gather(_SHARE, level) * tf.cast(sign, tf.float64)  # f64[N]


def _shear_x(images, level, sign):
    return _affine(images, b=_signed_share(level, sign))


def _shear_y(images, level, sign):
    return _affine(images, d=_signed_share(level, sign))


def _affine(images, **coefficients):
    """Pillow's (a, b, c, d, e, f): the identity but for what is given."""
    zero = tf.zeros(tf.shape(images)[:1], tf.float64)
    matrix = dict(a=zero + 1, b=zero, c=zero, d=zero, e=zero + 1, f=zero)
    matrix.update(coefficients)
    matrices = tf.stack([matrix[name] for name in "abcdef"], axis=1)
    return primitives.affine_nearest(images, matrices)


def _solarize(images, level, sign):
    del sign
    threshold = tf.cast(tf.gather(_THRESHOLD, level), tf.uint8)
    light = images >= tf.reshape(threshold, [-1, 1, 1, 1])
    # 255 - p is p with every bit flipped.
    return tf.bitwise.bitwise_xor(images, tf.cast(light, tf.uint8) * 255)


def _pixels(level, sign, size):
    share = _signed_share(level, sign)
    whole = tf.cast(share * tf.cast(size, tf.float64), tf.int32)  # truncates
    return tf.cast(whole, tf.float64)


def _translate_x(images, level, sign):
    width = tf.shape(images)[2]
    return _affine(images, c=_pixels(level, sign, width))


def _translate_y(images, level, sign):
    height = tf.shape(images)[1]
    return _affine(images, f=_pixels(level, sign, height))


OPS = {
    "AutoContrast": _auto_contrast,
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Equalize": _equalize,
    "Identity": _identity,
    "Posterize": _posterize,
    "Rotate": _rotate,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "Solarize": _solarize,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
}
NAMES = tuple(OPS)
# Inlined into a graph, a branch costs time per node even when it is not taken;
# as calls, thirteen of fourteen branches cost one node each.
_CALL = {"autograph": False, "experimental_attributes": {"_noinline": True}}
_CALLS = [tf.function(op, **_CALL) for op in OPS.values()]


def draw(seed, *, num_ops):
    """Draws a sequence of operations for one view.

    Operations are drawn with replacement, each equally likely; levels
    uniformly from 1..9; an operation is applied, and a sign is negative, with
    probability 0.5.

    Args:
        seed: i32[2].
        num_ops: static length of the sequence, 5 in CLSA.

    Returns:
        dict of `op` i32[num_ops] (index into `NAMES`), `level` i32[num_ops],
        `apply` bool[num_ops], `sign` i32[num_ops] in {-1, 1}.

    Source: maple-research-lab/CLSA@37df76c, RandAugment.__call__, n = 5,
    m = 10. A level or sign that goes unused is drawn all the same.
    """
    uniform = primitives.uniform(seed, shape=[4, num_ops])
    op, level, apply_, sign = tf.unstack(uniform)
    return {
        "op": tf.cast(op * len(NAMES), tf.int32),
        "level": 1 + tf.cast(level * MAX_LEVEL, tf.int32),
        "apply": apply_ < 0.5,
        "sign": 1 - 2 * tf.cast(sign < 0.5, tf.int32),
    }


def apply(image, params):
    """Executes a drawn sequence on one image; what was not drawn costs nothing.

    Args:
        image: u8[H,W,3].
        params: what `draw` returns.

    Returns:
        u8[H,W,3].
    """
    columns = [params["op"], params["level"], params["sign"]]
    rows = tf.boolean_mask(tf.stack(columns, axis=1), params["apply"])

    def step(i, images):
        op, level, sign = tf.unstack(rows[i, tf.newaxis], num=3, axis=1)
        branches = [
            lambda call=call: call(images, level, sign) for call in _CALLS
        ]
        result = tf.switch_case(op[0], branches)
        return i + 1, tf.ensure_shape(result, images.shape)

    count = tf.shape(rows)[0]
    loop = (lambda i, _: i < count), step, (0, tf.expand_dims(image, 0))
    return tf.while_loop(*loop)[1][0]


def describe(params):
    """Names the operations applied, in order, such as `"Rotate +12°"`.

    Args:
        params: what `draw` returns, with concrete values.

    Returns:
        list of str; empty where every operation was skipped.
    """
    columns = [np.asarray(params[k]) for k in ("op", "level", "apply", "sign")]
    return [
        _describe_one(NAMES[op], level, sign)
        for op, level, applied, sign in zip(*columns)
        if applied
    ]


def _describe_one(name, level, sign):
    if name == "Rotate":
        return f"{name} {sign * _DEGREES[level]:+d}°"
    if name.startswith("Shear"):
        return f"{name} {sign * _SHARE[level]:+.2f}"
    if name.startswith("Translate"):
        return f"{name} {100 * sign * _SHARE[level]:+.0f}%"
    if name == "Posterize":
        return f"{name} {_BITS[level]} bits"
    if name == "Solarize":
        return f"{name} {_THRESHOLD[level]}"
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return f"{name} {_FACTOR[level]:.2f}"
    return name
