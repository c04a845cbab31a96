"""CLSA's strong augmentation: a random sequence of operations on bytes.

`draw` decides, `apply` executes. An operation is an affine transform (a matrix
per image), a table lookup (a table per channel), or arithmetic on pixels;
`_AFFINES`, `_TABLES` and `_ARITHMETIC` say which. Levels are counted in
hundredths, 0..1000; the tables below turn one into the operation's own
parameter. Source: maple-research-lab/CLSA@37df76c, data_processing/
RandAugment.py; the operations are Pillow's.
"""

import math

import numpy as np
import tensorflow as tf

from clsa_tf.augment import primitives

MAX_LEVEL = 10
LEVEL_STEPS = 100  # steps per level

# Entry v belongs to level v / LEVEL_STEPS.
_LEVELS = np.arange(MAX_LEVEL * LEVEL_STEPS + 1) / LEVEL_STEPS
_FACTOR = (_LEVELS * 0.9 / 10 + 0.05).astype(np.float32)  # .05 .. .95
_BITS = (_LEVELS * 4 / 10).astype(np.int32) + 4
_THRESHOLD = 256 - (_LEVELS * 256 / 10).astype(np.int32)
_DEGREES = _LEVELS * 30 / 10
_SHARE = _LEVELS * 0.3 / 10  # of the side, or of a pixel per pixel
# Cosine and sine of the negative angle, rounded as Pillow rounds them.
_TURN = np.array(
    [
        [round(math.cos(angle), 15), round(math.sin(angle), 15)]
        for angle in [-math.radians(degrees) for degrees in _DEGREES]
    ]
)  # f64[1001,2]


# --- affine transforms: f64[N,6], see primitives.source_index ----------------


def _matrix(like, **coefficients):
    """The identity but for the f64[N] that are given."""
    zero = tf.zeros_like(like)
    matrix = dict(a=zero + 1, b=zero, c=zero, d=zero, e=zero + 1, f=zero)
    matrix.update(coefficients)
    return tf.stack([matrix[name] for name in "abcdef"], axis=1)


def _rotate(level, sign, height, width):
    """Counter-clockwise about the centre, for positive signs."""
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
    side = tf.cast(side, tf.float64)
    # Whole pixels, cut off.
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
    # float64 and two rounded products decide where fractions are cut. The
    # maximum, idle otherwise, keeps compilers from fusing product and sum.
    tables = tf.nn.relu(values * scale) - tf.nn.relu(low * scale)
    tables = tf.clip_by_value(tables, 0.0, 255.0)
    return tf.cast(tf.where(tf.equal(low, high), values, tables), tf.uint8)


def _equalize(images, level):
    del level
    counts = primitives.histogram(images)  # i32[N,3,256]
    below = tf.cumsum(counts, axis=-1, exclusive=True)
    # Pixels darker than the lightest value present, in 255 equal steps.
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
    light = tf.cast(images, tf.int32) >= threshold  # up to 256: no byte
    return tf.where(light, 255 - images, images)


# --- the sequence ------------------------------------------------------------

_AFFINES = {
    "Rotate": _rotate,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
}
_TABLES = {"AutoContrast": _auto_contrast, "Equalize": _equalize}
_ARITHMETIC = {
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Invert": _invert,
    "Posterize": _posterize,
    "Sharpness": _sharpness,
    "Solarize": _solarize,
}
NAMES = tuple(sorted(["Identity", *_AFFINES, *_TABLES, *_ARITHMETIC]))
SIGNED = tuple(_AFFINES)
WITHOUT_LEVEL = ("AutoContrast", "Equalize", "Identity", "Invert")

# The published table has Invert where the released code has Identity.
POOLS = {
    "released": tuple(name for name in NAMES if name != "Invert"),
    "paper": tuple(name for name in NAMES if name != "Identity"),
}
# Uniform numbers that one operation of a sequence is drawn from.
NEEDS = 4


def specs(num_ops):
    """What `draw` returns for so many operations."""
    dtypes = dict(op=tf.int32, level=tf.int32, apply=tf.bool, sign=tf.int32)
    return {k: tf.TensorSpec([num_ops], v) for k, v in dtypes.items()}


def draw(uniform, *, pool="released", max_level=MAX_LEVEL):
    """Draws a sequence of operations for one view.

    Operations are drawn with replacement, each equally likely; an operation
    is applied, and a sign is negative, with probability 0.5. Levels are drawn
    uniformly: whole ones in 1..max_level - 1 from the released pool, in
    hundredths from 0 up to max_level from the paper's.

    Args:
        uniform: f32[4,num_ops], uniform numbers in [0, 1).
        pool: a key of `POOLS`.
        max_level: in 2..10; the released code has 10, and draws below it.

    Returns:
        dict of `op` i32[num_ops] (index into `NAMES`), `level` i32[num_ops]
        (in hundredths), `apply` bool[num_ops], `sign` i32[num_ops] in
        {-1, 1}.

    Source: maple-research-lab/CLSA@37df76c, RandAugment.__call__, n = 5,
    m = 10. A level or sign that goes unused is drawn all the same.
    """
    op, level, apply_, sign = tf.unstack(uniform, num=NEEDS)
    members = np.array([NAMES.index(name) for name in POOLS[pool]], np.int32)
    if pool == "paper":
        level = tf.cast(level * (max_level * LEVEL_STEPS + 1), tf.int32)
    else:
        level = 1 + tf.cast(level * (max_level - 1), tf.int32)
        level *= LEVEL_STEPS
    return {
        "op": tf.gather(members, tf.cast(op * len(members), tf.int32)),
        "level": level,
        "apply": apply_ < 0.5,
        "sign": 1 - 2 * tf.cast(sign < 0.5, tf.int32),
    }


def apply(images, params):
    """Executes drawn sequences; a single image pays for what was drawn only.

    Args:
        images: u8[N,3,H,W].
        params: what `draw` returns, with a leading axis N.

    Returns:
        u8[N,3,H,W].
    """
    # What is applied comes first, so that the loop can end with it.
    order = tf.argsort(tf.cast(~params["apply"], tf.int32), stable=True)
    applied, op, level, sign = (
        tf.gather(params[name], order, batch_dims=1)  # [N,num_ops]
        for name in ("apply", "op", "level", "sign")
    )
    op = tf.where(applied, op, NAMES.index("Identity"))
    length = tf.reduce_max(tf.reduce_sum(tf.cast(applied, tf.int32), axis=1))

    def step(i, images):
        arguments = [tf.gather(x, i, axis=1) for x in (op, level, sign)]
        result = apply_one(images, *arguments)
        return i + 1, tf.ensure_shape(result, images.shape)

    loop = (lambda i, _: i < length), step, (0, images)
    return tf.while_loop(*loop)[1]


def apply_one(images, op, level, sign):
    """Executes one operation per image.

    Args:
        images: u8[N,3,H,W].
        op: i32[N], indices into `NAMES`.
        level: i32[N], in hundredths, 0..1000.
        sign: i32[N], -1 or 1; turns the `SIGNED` operations around.

    Returns:
        u8[N,3,H,W].
    """
    height, width = primitives.size(images)
    direction = tf.cast(sign, tf.float64)

    def affine():
        def source_index():
            matrices = _pick(
                op, _AFFINES, lambda f: f(level, direction, height, width)
            )
            return primitives.source_index(matrices, height=height, width=width)

        # The first branch is never taken, but XLA does not know: it finishes
        # the index before it gathers with it, instead of computing it anew,
        # ten times as slowly, within the gather.
        nowhere = tf.zeros([tf.size(op), height, width], tf.int32)
        index = primitives.choose(
            tf.cast(tf.greater_equal(level, 0), tf.int32),
            [lambda: nowhere, source_index],
        )
        return primitives.take(images, index)

    def lookup():
        tables = _pick(op, _TABLES, lambda f: f(images, level))
        return primitives.lookup(images, tables)

    def arithmetic():
        return _pick(op, _ARITHMETIC, lambda f: f(images, level))

    kinds = [_AFFINES, _TABLES, _ARITHMETIC]
    numbers = [
        sum(i * (name in kind) for i, kind in enumerate(kinds, start=1))
        for name in NAMES
    ]
    number = tf.gather(tf.constant(numbers), op)
    branches = [lambda: images, affine, lookup, arithmetic]
    return primitives.choose(number, branches)


def _pick(op, functions, call):
    """For each image, `call` of the function that `op` names among several."""
    names = list(functions)
    numbers = [names.index(x) if x in names else 0 for x in NAMES]
    number = tf.gather(tf.constant(numbers), op)
    return primitives.choose(
        number, [lambda f=f: call(f) for f in functions.values()]
    )


def describe(params):
    """Names the operations applied, in order, such as `"Rotate +12°"`.

    Args:
        params: what `draw` returns, with concrete values.

    Returns:
        list of str; empty where every operation was skipped.
    """
    columns = [np.asarray(params[k]) for k in ("op", "level", "apply", "sign")]
    return [
        describe_one(NAMES[op], level, sign)
        for op, level, applied, sign in zip(*columns)
        if applied
    ]


def describe_one(name, level, sign):
    """Says what an operation does, at a level in hundredths."""
    if name == "Rotate":
        return f"{name} {sign * _DEGREES[level]:+.4g}°"
    if name.startswith("Shear"):
        return f"{name} {sign * _SHARE[level]:+.2f}"
    if name.startswith("Translate"):
        return f"{name} {100 * sign * _SHARE[level]:+.0f}%"
    if name == "Posterize":
        return f"{name} {_BITS[level]} bits"
    if name == "Solarize":
        return f"{name} {_THRESHOLD[level]}"
    if name in WITHOUT_LEVEL:
        return name
    return f"{name} {_FACTOR[level]:.2f}"
