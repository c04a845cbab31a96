"""Random keys, and the rows of each worker: the order of the examples.

The order is a function of (seed, counter). The example with counter `i` belongs
to epoch `i // size`. Within an epoch the order is a permutation drawn from
(seed, epoch). Nothing else influences it, so a dataset that starts at a later
counter yields the tail of the same sequence.
"""

import dataclasses

import tensorflow as tf

# Purposes of random draws. Each draws from its own sequence.
ORDER, SHARDS, WINDOW, VIEWS, ROWS = range(5)


def key(seed, purpose, *numbers) -> tf.Tensor:
    """Derives the key of one random draw.

    Args:
        seed: the run's seed, an integer.
        purpose: one of the constants above.
        *numbers: integers or i64[] that identify the draw: epoch, counter,
            step, index of the view.

    Returns:
        i64[2], a seed for `tf.random.stateless_*`.
    """
    result = tf.constant([seed, purpose], tf.int64)  # [2]
    for number in numbers:
        # Always Philox, because XLA would choose another algorithm.
        result = tf.random.experimental.stateless_fold_in(
            result, tf.cast(number, tf.int64), alg="philox"
        )
    return result


@dataclasses.dataclass(frozen=True)
class Worker:
    """One of the processes that each make a part of every global batch.

    Attributes:
        index: number of this process, in [0, count). It makes that part of the
            batch.
        count: number of processes. It divides the batch size.
    """

    index: int = 0
    count: int = 1

    def rows(self, batch_size):
        """Returns the slice of the global batch that this worker makes."""
        share = batch_size // self.count
        return slice(self.index * share, (self.index + 1) * share)


ALONE = Worker()


def prefetch_in_order(batches, *, prefetch):
    """Prefetches `prefetch` batches without changing their order."""
    options = tf.data.Options()
    options.deterministic = True
    return batches.prefetch(prefetch).with_options(options)
