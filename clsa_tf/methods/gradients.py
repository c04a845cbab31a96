"""Gradients of a batch: at once, or one micro-batch after the other."""

import tensorflow as tf
from tensorflow import keras

from clsa_tf.distributed import collectives


def of_batch(method, batch, targets):
    """Gradients of the mean loss of the global batch.

    Args:
        method: compiled `clsa_tf.methods.base.Method`.
        batch: dictionary of `[N, ...]`, see `Method.targets`.
        targets: what `method.targets` returned.

    Returns:
        list of the gradients of `method.learned`, this replica's share of the
        sum; dictionary of float32 scalars, mean reports; and what
        `method.embed` returned, or None where it was never there as a whole.
    """
    if method.config.accumulation_steps == 1:
        gradients, reports, embedded = _at_once(method, batch, targets)
    elif method.whole_batch:
        gradients, reports, embedded = _in_two_passes(method, batch, targets)
    else:
        gradients, reports = _part_by_part(method, batch, targets)
        embedded = None
    if _scales(method):
        gradients = method.optimizer.get_unscaled_gradients(gradients)
    return gradients, reports, embedded


def _at_once(method, batch, targets):
    """Gradients, mean reports and embeddings of a (micro-)batch."""
    with tf.GradientTape() as tape:
        embedded = method.embed(batch)
        loss, reports = _loss(method, embedded, targets, batch["rows"])
    return tape.gradient(loss, method.learned), reports, embedded


def _part_by_part(method, batch, targets):
    """Gradients and mean reports, summed over the micro-batches."""
    parts = method.config.accumulation_steps
    total = _sum_over_parts(
        lambda part: _at_once(method, part, targets)[:2], batch, parts
    )
    return tf.nest.map_structure(lambda x: x / parts, total)


def _in_two_passes(method, batch, targets):
    """The same as `_at_once`, with one micro-batch in memory at a time.

    Embeddings of all micro-batches first; the gradients of the loss by them;
    then each micro-batch again, with its share of these.
    """
    names = []

    def embed(part):
        found = method.embed(part)
        names[:] = found
        return tf.stack(list(found.values()), axis=1)  # [n, V, D]

    rows = method.in_parts(embed, batch)
    with tf.GradientTape() as tape:
        tape.watch(rows)
        embedded = dict(zip(names, tf.unstack(rows, axis=1)))
        loss, reports = _loss(method, embedded, targets, batch["rows"])
    by_rows = tape.gradient(loss, rows)  # [N, V, D]

    def by_weights(part):
        part, share = part
        with tf.GradientTape() as tape:
            found = embed(part)
        return tape.gradient(found, method.learned, output_gradients=share)

    total = _sum_over_parts(
        by_weights, (batch, by_rows), method.config.accumulation_steps
    )
    return total, reports, embedded


def _sum_over_parts(function, rows, parts):
    """Sum of `function` over the micro-batches of a structure of rows."""
    split = tf.nest.map_structure(lambda x: in_parts(x, parts), rows)

    def part(i):
        return function(tf.nest.map_structure(lambda x: tf.gather(x, i), split))

    def add(i, total):
        return i + 1, tf.nest.map_structure(tf.add, total, part(i))

    # A loop, so that no two micro-batches are in memory at a time.
    _, total = tf.while_loop(
        lambda i, _: i < parts, add, (1, part(0)), parallel_iterations=1
    )
    return total


def _loss(method, embedded, targets, rows):
    """What the gradient is taken of, and mean reports."""
    per_row, reports = method.compare(embedded, targets, rows)
    reports = {"loss": per_row} | reports
    reports = {k: tf.reduce_mean(x) for k, x in reports.items()}
    # The optimizer sums gradients over replicas: divided by their number the
    # result is the gradient of the global batch's mean.
    loss = reports["loss"] / collectives.num_replicas()
    if _scales(method):
        loss = method.optimizer.get_scaled_loss(loss)
    return loss, reports


def _scales(method):
    kind = keras.mixed_precision.LossScaleOptimizer
    return isinstance(method.optimizer, kind)


def in_parts(rows, parts):
    """`[N, ...]` -> `[parts, N / parts, ...]`."""
    return tf.reshape(rows, [parts, rows.shape[0] // parts, *rows.shape[1:]])


def flat(rows):
    """`[parts, n, ...]` -> `[parts n, ...]`."""
    return tf.reshape(rows, [-1, *rows.shape[2:]])
