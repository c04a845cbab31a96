"""CLSA's strong augmentation: a random sequence of operations on bytes.

`draw` draws the parameters, `apply` executes them. `strong_ops` defines the
operations.

Source: maple-research-lab/CLSA@37df76c, data_processing/RandAugment.py.
"""

import numpy as np
import tensorflow as tf

from clsa_tf.augment import primitives
from clsa_tf.augment.strong_ops import (
    AFFINE,
    ARITHMETIC,
    LEVEL_STEPS,
    MAX_LEVEL,
    STRONG_OPS,
    TABLE,
)

NAMES = tuple(STRONG_OPS)
POOLS = {
    pool: tuple(name for name, op in STRONG_OPS.items() if pool in op.pools)
    for pool in dict.fromkeys(
        pool for op in STRONG_OPS.values() for pool in op.pools
    )
}
# Uniform random numbers per operation of a sequence.
NUM_UNIFORMS = 4


def specs(num_ops):
    """`TensorSpec`s of the result of `draw` for `num_ops` operations."""
    dtypes = dict(op=tf.int32, level=tf.int32, apply=tf.bool, sign=tf.int32)
    return {k: tf.TensorSpec([num_ops], v) for k, v in dtypes.items()}


def draw(uniform, *, pool="released", max_level=MAX_LEVEL):
    """Draws a sequence of operations for one view.

    Operations are drawn with replacement, each equally likely. An operation is
    applied with probability 0.5, and a sign is negative with probability 0.5.
    Levels are uniform: whole levels in 1..max_level - 1 for the pool
    "released", hundredths of a level in 0..max_level for the pool "paper".

    Args:
        uniform: f32[4,num_ops], uniform numbers in [0, 1).
        pool: a key of `POOLS`.
        max_level: in 2..10. The released code uses 10, exclusive.

    Returns:
        dict of `op` i32[num_ops] (index into `NAMES`), `level` i32[num_ops]
        (in hundredths), `apply` bool[num_ops], `sign` i32[num_ops] in
        {-1, 1}.

    Source: maple-research-lab/CLSA@37df76c, RandAugment.__call__, n = 5,
    m = 10. Unused levels and signs are drawn as well.
    """
    op, level, apply_, sign = tf.unstack(uniform, num=NUM_UNIFORMS)
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
    """Executes drawn sequences.

    With a single image only the drawn operations run.

    Args:
        images: u8[N,3,H,W].
        params: result of `draw`, with a leading axis N.

    Returns:
        u8[N,3,H,W].
    """
    # Applied operations come first, so that the loop can stop after them.
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
        sign: i32[N], -1 or 1; the direction of affine operations.

    Returns:
        u8[N,3,H,W].
    """
    height, width = primitives.size(images)
    direction = tf.cast(sign, tf.float64)

    def affine():
        def source_index():
            matrices = _pick(
                op, AFFINE, lambda f: f(level, direction, height, width)
            )
            return primitives.source_index(matrices, height=height, width=width)

        # The first branch is never taken. It keeps XLA from fusing the index
        # into the gather, which would recompute it ten times as slowly.
        nowhere = tf.zeros([tf.size(op), height, width], tf.int32)
        index = primitives.choose(
            tf.cast(tf.greater_equal(level, 0), tf.int32),
            [lambda: nowhere, source_index],
        )
        return primitives.take(images, index)

    def lookup():
        tables = _pick(op, TABLE, lambda f: f(images, level))
        return primitives.lookup(images, tables)

    def arithmetic():
        return _pick(op, ARITHMETIC, lambda f: f(images, level))

    kinds = ["", AFFINE, TABLE, ARITHMETIC]
    numbers = [kinds.index(operation.kind) for operation in STRONG_OPS.values()]
    number = tf.gather(tf.constant(numbers), op)
    branches = [lambda: images, affine, lookup, arithmetic]
    return primitives.choose(number, branches)


def _pick(op, kind, call):
    """Applies `call` to the function of each image's `op`.

    Args:
        op: i32[N], indices into `NAMES`.
        kind: kind of the operations to choose from. Images with an operation of
            another kind get an arbitrary result.
        call: function of an operation's function to a tensor [N,...].

    Returns:
        [N,...].
    """
    functions = {n: x.function for n, x in STRONG_OPS.items() if x.kind == kind}
    names = list(functions)
    numbers = [names.index(x) if x in names else 0 for x in NAMES]
    number = tf.gather(tf.constant(numbers), op)
    return primitives.choose(
        number, [lambda f=f: call(f) for f in functions.values()]
    )


def describe(params):
    """Describes the applied operations in order, such as `"Rotate +12°"`.

    Args:
        params: result of `draw`, with concrete values.

    Returns:
        list of str; empty if no operation was applied.
    """
    columns = [np.asarray(params[k]) for k in ("op", "level", "apply", "sign")]
    return [
        describe_one(NAMES[op], level, sign)
        for op, level, applied, sign in zip(*columns)
        if applied
    ]


def describe_one(name, level, sign):
    """Describes one operation at a level in hundredths."""
    parameter = STRONG_OPS[name].parameter
    return f"{name} {parameter(level, sign)}" if parameter else name
