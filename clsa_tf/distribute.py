"""Replicas: choosing a strategy, gathering over them, updating each alike."""

import tensorflow as tf

from clsa_tf.errors import UserError

STRATEGIES = ("auto", "one", "mirrored")


def make_strategy(name):
    """Returns the `tf.distribute.Strategy` called `name`.

    Args:
        name: `"one"` (first GPU, else the CPU), `"mirrored"` (all GPUs of this
            machine) or `"auto"` (`"mirrored"` where there are several GPUs).

    Raises:
        UserError: unknown name, or `"mirrored"` on a machine without GPU.
    """
    if name not in STRATEGIES:
        raise UserError(
            f"Expected a strategy out of {', '.join(STRATEGIES)}, received "
            f"{name!r}; set --strategy."
        )
    gpus = tf.config.list_logical_devices("GPU")
    # Several logical CPUs are how the tests make replicas.
    devices = gpus or tf.config.list_logical_devices("CPU")
    if name == "mirrored" and len(devices) == 1 and not gpus:
        raise UserError(
            "Expected GPUs for --strategy=mirrored, received a machine "
            "without any; use --strategy=auto or --strategy=one."
        )
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        return tf.distribute.MirroredStrategy([d.name for d in devices])
    return tf.distribute.OneDeviceStrategy(devices[0].name)


def num_replicas():
    """Number of replicas `R` in the current replica context."""
    return tf.distribute.get_replica_context().num_replicas_in_sync


def gather(rows):
    """Concatenates the rows of all replicas, in replica order.

    Args:
        rows: `[N, ...]` on each replica.

    Returns:
        `[G, ...]`, the same on each replica, `G = N R`. Differentiable.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return rows
    return context.all_gather(rows, axis=0)


def positives(rows):
    """Columns of this replica's own keys among the gathered keys.

    Args:
        rows: int, `N`, rows per replica.

    Returns:
        int32 `[N]`: global replica id * N + 0 .. N-1.

    Source: the published CLSA code uses the GPU's index *within its machine*,
    which is wrong on more than one machine (maple-research-lab/CLSA@37df76c).
    """
    context = tf.distribute.get_replica_context()
    # `replica_id_in_sync_group` is a tensor on every strategy.
    first = tf.cast(context.replica_id_in_sync_group, tf.int32) * rows
    return first + tf.range(rows, dtype=tf.int32)


def mean(values):
    """Averages each scalar of a dictionary over the replicas."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, values)


def moving_average(variables, sources, momentum):
    """Moves each variable towards its source: `v <- m v + (1 - m) s`.

    Args:
        variables: list of float variables, `v`.
        sources: list of variables of the same shapes, `s`.
        momentum: float in [0, 1], `m`.
    """

    def step(variable, source):
        # As a difference: exactly nothing happens when both are equal.
        variable.assign_sub((1.0 - momentum) * (variable - source))

    def update(strategy, variables, sources):
        for variable, source in zip(variables, sources):
            strategy.extended.update(variable, step, args=(source,))

    # Mirrored variables are written from the cross-replica context.
    tf.distribute.get_replica_context().merge_call(
        update, args=(variables, sources)
    )
