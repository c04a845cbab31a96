"""Sources: examples in an order that is a function of (seed, counter).

The example with counter `i` belongs to epoch `i // size`; within an epoch the
order is a permutation drawn from (seed, epoch). Nothing else decides it, so
that starting at another counter yields the tail of the same sequence.
"""

import dataclasses
from typing import Callable, Dict, Optional, Tuple

import tensorflow as tf

from clsa_tf.data.decode import attempt

Example = Dict[str, tf.Tensor]

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
class Source:
    """Where examples come from, and in which order.

    Attributes:
        name: the spelling it was opened with, for messages.
        size: number of examples in an epoch.
        class_names: names of the classes, by label; None without labels.
        random_access: whether any example can be had without reading those
            before it.
        epoch: `epoch(seed, e)` is the dataset of what identifies or holds
            each example of epoch `e`, in order; not shuffled if seed is None.
        read: from an element of that dataset to name, label and bytes.
        load: from those bytes to the encoded image; it may fail. None if they
            are the encoded image, and not where it is.
    """

    name: str
    size: int
    class_names: Optional[Tuple[str, ...]]
    random_access: bool
    epoch: Callable[[Optional[int], tf.Tensor], tf.data.Dataset]
    read: Callable[[tf.Tensor], Example]
    load: Optional[Callable[[tf.Tensor], tf.Tensor]] = None

    def items(
        self, *, start: int, seed: int, shuffle: bool, repeat: bool
    ) -> tf.data.Dataset:
        """Returns (counter i64[], what `read` takes) from a counter on.

        A start in the middle of an epoch passes over what comes before it:
        at most one epoch of indices (about 0.4 s per million), or of raw
        records where there is no random access; nothing is decoded.

        Args:
            start: counter of the first example.
            seed: seed of the order.
            shuffle: whether each epoch is a permutation, or the fixed order.
            repeat: whether epochs follow one another forever; otherwise the
                dataset ends with counter `size - 1`.

        Returns:
            Dataset of (counter, element for `read`).
        """
        first, offset = divmod(start, self.size)
        epochs = tf.data.Dataset.range(first, 2**40 if repeat else 1)

        def items(epoch):
            skipped = tf.where(epoch == first, tf.cast(offset, tf.int64), 0)
            order = self.epoch(seed if shuffle else None, epoch)
            return order.skip(skipped)

        counters = tf.data.Dataset.counter(start)
        return tf.data.Dataset.zip((counters, epochs.flat_map(items)))

    def examples(
        self, *, start: int, seed: int, shuffle: bool, repeat: bool
    ) -> tf.data.Dataset:
        """Returns the examples of `items`, with the same arguments.

        Returns:
            Dataset of `{"counter": i64[], "name": string[], "bytes": string[],
            "label": i64[]}`: `bytes` is the encoded image, empty if it could
            not be read; `label` is -1 if there is none; `name` is a path or
            such as `"imagenet2012/train #123"`.
        """

        def example(counter, item):
            found = {"counter": counter, **self.read(item)}
            if self.load:
                _, encoded = attempt(self.load, found["bytes"], otherwise="")
                found["bytes"] = encoded
            return found

        items = self.items(
            start=start, seed=seed, shuffle=shuffle, repeat=repeat
        )
        return items.map(
            example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )


def indexed(name, size, class_names, read, load=None) -> Source:
    """Builds a source of which any example can be had by its index.

    Args:
        name: see `Source`.
        size: see `Source`.
        class_names: see `Source`.
        read: function from the index i64[] of an example, in [0, size), to
            its name, label and bytes.
        load: see `Source`.

    Returns:
        A `Source` whose epochs are uniformly drawn permutations.
    """

    def epoch(seed, number):
        if seed is None:
            return tf.data.Dataset.range(size)
        # Not index_shuffle, which would need no table: for 20,000 examples
        # and fewer it knows only 256 permutations (TF 2.15.1).
        indices = tf.random.experimental.stateless_shuffle(
            tf.range(size, dtype=tf.int64), key(seed, ORDER, number)
        )  # [size]
        return tf.data.Dataset.from_tensor_slices(indices)

    return Source(name, size, class_names, True, epoch, read, load)
