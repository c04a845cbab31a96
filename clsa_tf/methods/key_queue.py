"""The queue of keys: a ring buffer of the latest `K` keys."""

import tensorflow as tf


class KeyQueue(tf.Module):
    """Ring buffer of keys (unit projections); checkpoints contain it.

    It starts with random unit vectors, which are easy negatives: accuracy is
    near 100 % and the loss low until keys have replaced them (`K / G` steps).

    All replicas enqueue the same gathered keys, so the copies of a mirrored
    queue stay bit-equal without communication.

    Attributes:
        keys: float32 `[K, D]`, unit rows.
        pointer: int64 scalar in [0, K), the row that the next key overwrites.

    Source: MoCo (facebookresearch/moco@7397dfe). That code requires a `K` that
    the global batch divides; here writes wrap around the end.
    """

    def __init__(self, size, dimension, *, seed, name="queue"):
        """Creates a queue of `size` random unit keys of width `dimension`."""
        super().__init__(name=name)
        start = tf.random.stateless_normal(
            [size, dimension], seed=[seed, 0], alg="philox"
        )
        self.keys = tf.Variable(
            tf.math.l2_normalize(start, axis=1), trainable=False, name="keys"
        )
        self.pointer = tf.Variable(
            tf.zeros([], tf.int64),
            trainable=False,
            name="pointer",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def enqueue(self, keys):
        """Overwrites the `G` oldest keys in order; wraps around at the end.

        Args:
            keys: float32 `[G, D]`, unit rows, `G <= K`; the same (gathered) on
                all replicas.
        """
        size = self.keys.shape[0]
        count = tf.shape(keys, tf.int64)[0]
        rows = (self.pointer + tf.range(count)) % size
        self.keys.scatter_update(tf.IndexedSlices(keys, rows))
        self.pointer.assign((self.pointer + count) % size)
