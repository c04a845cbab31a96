"""Products of rows in true float32, also where TF32 is allowed."""

import tensorflow as tf

# Mask that clears the 13 bits of the mantissa that TF32 lacks.
_TF32_BITS = -(2**13)


def at_least_float32(x):
    """Returns `x` as float32, or as it is if it is float64."""
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def all_pairs(rows, columns):
    """Inner products of every row with every column.

    Args:
        rows: float `[N, D]`.
        columns: float `[C, D]`.

    Returns:
        float32 `[N, C]`, float64 if the inputs are.
    """
    rows, columns = at_least_float32(rows), at_least_float32(columns)
    if rows.dtype == tf.float32 and _tf32_is_used():
        return split_product(rows, columns)
    return tf.einsum("nd,cd->nc", rows, columns)


def row_by_row(rows, others):
    """Inner product of each row with the same row of `others`.

    Args:
        rows: float `[N, D]`.
        others: float `[N, D]`.

    Returns:
        float32 `[N]`, float64 if the inputs are.
    """
    rows, others = at_least_float32(rows), at_least_float32(others)
    if rows.dtype == tf.float32 and _tf32_is_used():
        return tf.reduce_sum(rows * others, axis=1)
    return tf.einsum("nd,nd->n", rows, others)


def _tf32_is_used():
    return (
        tf.config.experimental.tensor_float_32_execution_enabled()
        and len(tf.config.list_physical_devices("GPU")) > 0
    )


@tf.custom_gradient
def split_product(rows, columns):
    """`all_pairs` of float32 by products that TF32 does not round.

    Each factor is split into a part that TF32 holds exactly and a remainder.
    The product of the two remainders is omitted: it is 2^-22 of the result.
    """

    def gradient(upstream):
        return (
            split_product(upstream, tf.transpose(columns)),
            split_product(tf.transpose(upstream), tf.transpose(rows)),
        )

    high, low = _split(rows)
    other_high, other_low = _split(columns)

    def product(x, y):
        return tf.matmul(x, y, transpose_b=True)

    found = product(high, other_low) + product(low, other_high)
    return found + product(high, other_high), gradient


def _split(x):
    bits = tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), _TF32_BITS)
    high = tf.bitcast(bits, tf.float32)
    return high, x - high
