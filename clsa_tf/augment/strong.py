"""CLSA's strong augmentation: a random sequence of operations on bytes.

`draw` decides, `apply` executes; `strong_ops` has the operations.

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
# Uniform numbers that one operation of a sequence is drawn from.
NUM_UNIFORMS = 4


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
        sign: i32[N], -1 or 1; turns affine operations around.

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
    """For each image, `call` of the function that `op` names, of one kind."""
    functions = {n: x.function for n, x in STRONG_OPS.items() if x.kind == kind}
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
    parameter = STRONG_OPS[name].parameter
    return f"{name} {parameter(level, sign)}" if parameter else name
