"""Collective operations, called in the replica context unless noted."""

import tensorflow as tf


def num_replicas():
    """Number of replicas `R` in the current replica context."""
    return tf.distribute.get_replica_context().num_replicas_in_sync


def num_loaders(strategy=None):
    """Number of hosts, each of which loads a part of the global batch.

    Args:
        strategy: `tf.distribute.Strategy`; None: the current one.
    """
    strategy = strategy or tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        cluster = strategy.cluster_resolver.cluster_spec().as_dict()
        return sum(len(cluster.get(job, [])) for job in ("chief", "worker"))
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return strategy.extended.num_hosts
    return 1


def gather(rows):
    """Concatenates the rows of all replicas, in replica order.

    Args:
        rows: float or int32 `[N, ...]` on each replica; `N` is static.

    Returns:
        `[G, ...]`, the same on each replica, `G = N R`. Differentiable; the
        gradient is that of the sum of all replicas' losses.
    """
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync
    if replicas == 1:
        return rows
    # A sum with zeros (exact) instead of `all_gather`, because XLA compiles it
    # on GPUs and TPUs.
    place = tf.reshape(_replica_id(), [1, 1])
    shape = [replicas, *rows.shape]
    placed = tf.scatter_nd(place, rows[tf.newaxis], shape)
    total = context.all_reduce(tf.distribute.ReduceOp.SUM, placed)
    return tf.reshape(total, [replicas * rows.shape[0], *rows.shape[1:]])


def total(tensors):
    """Sums each tensor of a list over the replicas."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def exchange(images, order):
    """Fetches images of the global batch from all replicas.

    Args:
        images: uint8 `[N, ...]` on each replica; the shape is static.
        order: int32 `[N]`, positions in the global batch of the images to
            fetch.

    Returns:
        uint8 `[N, ...]`.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return tf.gather(images, order)
    flat = tf.reshape(images, [images.shape[0], -1])  # [N, bytes]
    width = flat.shape[1]
    # No collective supports bytes, so four of them are packed into an int32. (A
    # float could be a NaN, whose bits some devices change.)
    words = tf.pad(flat, [[0, 0], [0, -width % 4]])
    words = tf.bitcast(
        tf.reshape(words, [images.shape[0], -1, 4]), tf.int32
    )  # [N, words]
    words = context.all_gather(words, axis=0)  # [G, words]
    wanted = tf.bitcast(tf.gather(words, order), tf.uint8)  # [N, words, 4]
    wanted = tf.reshape(wanted, [images.shape[0], -1])[:, :width]
    return tf.reshape(wanted, images.shape)


def example_ids(rows):
    """Positions of this replica's examples in the global batch.

    An example's id is also the column of its own key among the gathered keys.

    Args:
        rows: int, `N`, examples per replica.

    Returns:
        int32 `[N]`: global replica id * N + 0 .. N-1.

    Source: the published CLSA code uses the GPU's index *within its machine*,
    which is wrong with several machines (maple-research-lab/CLSA@37df76c).
    """
    return _replica_id() * rows + tf.range(rows, dtype=tf.int32)


def _replica_id():
    context = tf.distribute.get_replica_context()
    # A tensor with all strategies.
    return tf.cast(context.replica_id_in_sync_group, tf.int32)


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
        momentum: function without arguments that returns `m`, a float or
            scalar tensor in [0, 1].
    """

    def step(variable, source, share):
        # As a difference, so that equal variables stay bit-equal.
        variable.assign_sub(share * (variable - source))

    def update(strategy, variables, sources):
        share = 1.0 - momentum()
        for variable, source in zip(variables, sources):
            strategy.extended.update(variable, step, args=(source, share))

    # Mirrored variables are written in the cross-replica context, except if XLA
    # compiles the replica's step. Keras' optimizers do the same.
    tf.__internal__.distribute.interim.maybe_merge_call(
        update, tf.distribute.get_strategy(), variables, sources
    )
