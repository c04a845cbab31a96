"""Sources: examples in an order that is a function of (seed, counter).

The example with counter `i` belongs to epoch `i // size`; within an epoch the
order is a permutation drawn from (seed, epoch). Nothing else decides it, so
that starting at another counter yields the tail of the same sequence.
"""

import dataclasses

import tensorflow as tf

# What a seed is used for; each use draws from a sequence of its own.
ORDER, SHARDS, WINDOW, VIEWS, ROWS = range(5)


def key(seed, purpose, *numbers) -> tf.Tensor:
    """Derives the key of one random draw.

    Args:
        seed: the run's seed, an integer.
        purpose: one of the constants above.
        *numbers: integers or i64[] that tell this draw from others: epoch,
            counter, step, index of the view.

    Returns:
        i64[2], a seed for `tf.random.stateless_*`.
    """
    result = tf.constant([seed, purpose], tf.int64)  # [2]
    for number in numbers:
        # Philox, also under XLA, which has a preference of its own.
        result = tf.random.experimental.stateless_fold_in(
            result, tf.cast(number, tf.int64), alg="philox"
        )
    return result


@dataclasses.dataclass(frozen=True)
class Worker:
    """One of the processes that make each global batch together.

    Attributes:
        index: of this one, in [0, count); it makes the `index`-th part.
        count: of all; it divides the batch.
    """

    index: int = 0
    count: int = 1

    def rows(self, batch_size):
        """Slice of the global batch that this worker makes."""
        share = batch_size // self.count
        return slice(self.index * share, (self.index + 1) * share)


ALONE = Worker()


def prefetch_in_order(batches, *, prefetch):
    """Keeps `prefetch` batches ready, and keeps their order."""
    options = tf.data.Options()
    options.deterministic = True
    return batches.prefetch(prefetch).with_options(options)
