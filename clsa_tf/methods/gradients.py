"""Gradients of a batch, at once or with gradient accumulation."""

import inspect

import tensorflow as tf
from tensorflow import keras

from clsa_tf.distributed import collectives


def of_batch(method, batch, targets):
    """Computes the gradients of the mean loss of the global batch.

    Args:
        method: compiled `clsa_tf.methods.base.Method`.
        batch: dictionary of `[N, ...]`, see `Method`.
        targets: result of `method.targets`.

    Returns:
        list of the gradients of `method.learned`, summed over the replicas;
        dictionary of float32 scalars, mean reports; and the outputs of
        `method.forward`, `[N, ...]`.
    """
    if method.config.accumulation_steps == 1:
        gradients, reports, outputs = _at_once(method, batch, targets)
    elif method.whole_batch:
        gradients, reports, outputs = _in_two_passes(method, batch, targets)
    else:
        gradients, reports, outputs = _part_by_part(method, batch, targets)
    gradients = collectives.total(gradients)
    if scales(method):
        gradients = method.optimizer.get_unscaled_gradients(gradients)
    return gradients, reports, tf.nest.map_structure(tf.stop_gradient, outputs)


def _at_once(method, batch, targets):
    """Gradients, mean reports and outputs of a (micro-)batch."""
    with tf.GradientTape() as tape:
        outputs = method.forward(batch)
        loss, reports = _mean_loss(method, outputs, targets, batch)
    return _gradient(tape, loss, method.learned), reports, outputs


def _part_by_part(method, batch, targets):
    """Like `_at_once`, as means over the micro-batches."""
    parts = method.config.accumulation_steps

    def part(batch):
        gradients, reports, outputs = _at_once(method, batch, targets)
        return (gradients, reports), outputs

    total, outputs = _over_parts(part, batch, parts)
    return *tf.nest.map_structure(lambda x: x / parts, total), outputs


def _in_two_passes(method, batch, targets):
    """Like `_at_once`, with one micro-batch in memory at a time.

    The first pass computes the outputs of all micro-batches, then the gradients
    of the loss with respect to these outputs. The second pass computes each
    micro-batch again and propagates its part of these gradients.
    """
    parts = method.config.accumulation_steps
    outputs = map_parts(method.forward, batch, parts)
    with tf.GradientTape() as tape:
        leaves = tf.nest.flatten(outputs)
        tape.watch(leaves)
        loss, reports = _mean_loss(
            method, tf.nest.pack_sequence_as(outputs, leaves), targets, batch
        )
    own = list(method.loss_variables)
    found = _gradient(tape, loss, [*leaves, *own])
    by_outputs, by_own = found[: len(leaves)], found[len(leaves) :]

    def by_weights(part):
        part, shares = part
        with tf.GradientTape() as tape:
            leaves = tf.nest.flatten(method.forward(part))
        return _gradient(tape, leaves, method.learned, shares), ()

    total, _ = _over_parts(by_weights, (batch, by_outputs), parts)
    direct = {v.ref(): gradient for v, gradient in zip(own, by_own)}
    total = [
        gradient + direct[v.ref()] if v.ref() in direct else gradient
        for v, gradient in zip(method.learned, total)
    ]
    return total, reports, outputs


def _gradient(tape, target, sources, output_gradients=None):
    """Gradients as dense tensors; zeros for unconnected sources."""
    return [
        tf.convert_to_tensor(gradient)
        for gradient in tape.gradient(
            target,
            sources,
            output_gradients=output_gradients,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
    ]


def map_parts(function, rows, parts):
    """Applies a function to each micro-batch in turn.

    Args:
        function: maps a micro-batch to a structure of tensors `[n, ...]`.
        rows: structure of tensors `[N, ...]`.
        parts: number of micro-batches; divides `N`.

    Returns:
        the same structure as `function`, of tensors `[N, ...]`.
    """
    if parts == 1:
        return function(rows)
    return _over_parts(lambda part: ((), function(part)), rows, parts)[1]


def _over_parts(function, rows, parts):
    """Applies a function to each micro-batch; sums and joins its results.

    Args:
        function: maps a micro-batch to a structure of tensors to sum, and a
            structure of tensors `[n, ...]` to join.
        rows: structure of tensors `[N, ...]`.
        parts: number of micro-batches.

    Returns:
        the sums, and the joined tensors `[N, ...]`.
    """
    split = tf.nest.map_structure(lambda x: in_parts(x, parts), rows)

    def part(i):
        return function(tf.nest.map_structure(lambda x: tf.gather(x, i), split))

    def add(i, total, arrays):
        more, joined = part(i)
        leaves = tf.nest.flatten(joined)
        arrays = [array.write(i, x) for array, x in zip(arrays, leaves)]
        return i + 1, tf.nest.map_structure(tf.add, total, more), arrays

    # The first part defines structure and shapes. The others run in a loop, so
    # that only one of them is in memory at a time.
    total, first = part(0)
    arrays = [
        tf.TensorArray(x.dtype, parts, element_shape=x.shape).write(0, x)
        for x in tf.nest.flatten(first)
    ]
    _, total, arrays = tf.while_loop(
        lambda i, *_: i < parts,
        add,
        (1, total, arrays),
        parallel_iterations=1,
    )
    joined = [flat(array.stack()) for array in arrays]
    return total, tf.nest.pack_sequence_as(first, joined)


def _mean_loss(method, outputs, targets, batch):
    """The scalar to differentiate, and the mean reports."""
    per_example, reports = method.loss(outputs, targets, batch)
    reports = {"loss": per_example} | reports
    reports = {k: tf.reduce_mean(x) for k, x in reports.items()}
    # Gradients are summed over the replicas. Dividing by their number gives the
    # gradient of the global batch's mean.
    loss = reports["loss"] / collectives.num_replicas()
    if scales(method):
        loss = method.optimizer.get_scaled_loss(loss)
    return loss, reports


# ---- Loss scaling (float16)


def scales(method):
    """Whether the optimizer of a method scales the loss."""
    kind = keras.mixed_precision.LossScaleOptimizer
    return isinstance(method.optimizer, kind)


def apply(method, gradients):
    """Applies the gradients of the global batch with the optimizer."""
    optimizer = method.optimizer
    legacy = isinstance(
        getattr(optimizer, "inner_optimizer", optimizer),
        keras.optimizers.legacy.Optimizer,
    )
    summed = (
        {"experimental_aggregate_gradients": False}
        if legacy
        else {"skip_gradients_aggregation": True}
    )
    optimizer.apply_gradients(zip(gradients, method.learned), **summed)


def state(method):
    """Values of all variables that a step changes except the learned ones.

    These are running statistics, the momentum encoder and queues. The list is
    empty without loss scaling, because no step is skipped then.

    Returns:
        list of (variable, tensor).
    """
    if not scales(method):
        return []
    slots = method.optimizer.variables
    if inspect.ismethod(slots):  # of Keras' legacy optimizers
        slots = slots()
    left = [*method.learned, *slots, method.steps_taken]
    refs = {v.ref() for v in left}
    return [
        (v, tf.identity(v)) for v in method.variables if v.ref() not in refs
    ]


def undo_skipped(method, gradients, before):
    """Restores the variables of `before` if the optimizer skipped the step.

    The loss scaler skips steps whose gradients are not finite. A skipped step
    still counts for the position in the data and the learning-rate schedule. It
    also counts in AdamW's bias correction: after five skipped steps at the
    start, the next updates are half as long.

    Args:
        method: `Method`.
        gradients: list of tensors, equal on all replicas.
        before: result of `state` before the step.
    """
    if not scales(method):
        return
    finite = tf.reduce_all(
        [tf.reduce_all(tf.math.is_finite(x)) for x in gradients]
    )
    for variable, value in before:
        variable.assign(tf.where(finite, variable, value))
    method.optimizer.iterations.assign(method.steps_taken + 1)


def in_parts(rows, parts):
    """`[N, ...]` -> `[parts, N / parts, ...]`."""
    return tf.reshape(rows, [parts, rows.shape[0] // parts, *rows.shape[1:]])


def flat(rows):
    """`[parts, n, ...]` -> `[parts n, ...]`."""
    return tf.reshape(rows, [-1, *rows.shape[2:]])
