"""A source: examples in an order that is a function of (seed, counter)."""

import dataclasses
from typing import Callable, Dict, Optional, Tuple

import tensorflow as tf

from clsa_tf.data import headers
from clsa_tf.data.graph_calls import attempt
from clsa_tf.data.order import ORDER, Worker, key

Example = Dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Absent:
    """Stands for a `Source` that there is not.

    Attributes:
        reason: why, a clause that can follow a colon.
    """

    reason: str


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
            Without random access `epoch(seed, e, worker)` is the part of it
            that this `Worker` reads.
        read: from an element of that dataset to name, label and bytes.
        load: from those bytes to the encoded image and `headers.OK`, or to
            "" and another code; it may fail. None if they are the encoded
            image, and not where it is.
        local: why `read` or `load` works in this process only, as Python
            does; "" if they work elsewhere.
        rules: how its images are decoded.
        notes: sentences about it that a person should see at the start.
        fingerprint: function that returns a digest of which examples these
            are, in which order, the same wherever they are stored; see
            `clsa_tf.data.sources.fingerprint`. None if nothing is known.
        unlabelled: why there are no class names, a clause; "" if there are.
        about: how the images were chosen and labelled, a clause; "" if there
            is nothing to say.
        held_out: images of the same folder that are kept for evaluation.
    """

    name: str
    size: int
    class_names: Optional[Tuple[str, ...]]
    random_access: bool
    epoch: Callable[..., tf.data.Dataset]
    read: Callable[[tf.Tensor], Example]
    load: Optional[Callable[[tf.Tensor], tf.Tensor]] = None
    local: str = ""
    rules: headers.Rules = headers.DEFAULT
    notes: Tuple[str, ...] = ()
    fingerprint: Optional[Callable[[], str]] = None
    unlabelled: str = ""
    about: str = ""
    held_out: int = 0

    def epoch_size(self, batch_size: int, whole_epochs: bool) -> int:
        """Examples that an epoch uses: all, or those of its whole batches."""
        rest = self.size % batch_size if whole_epochs else 0
        return self.size - rest

    def items(
        self,
        *,
        start: int,
        seed: int,
        shuffle: bool,
        repeat: bool,
        size: Optional[int] = None,
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
            size: examples that are taken from each epoch; None: all.

        Returns:
            Dataset of (counter, element for `read`).
        """
        size = size or self.size

        def epoch(number):
            whole = self.epoch(seed if shuffle else None, number)
            # (A stream that is read to its end checks its length there.)
            return whole if size == self.size else whole.take(size)

        order = _epochs(
            epoch,
            size=size,
            start=start,
            stop=2**40 if repeat else 1,
        )
        return tf.data.Dataset.zip((tf.data.Dataset.counter(start), order))

    def items_of(
        self,
        worker: Worker,
        *,
        start: int,
        seed: int,
        batch_size: int,
        whole_epochs: bool,
    ) -> tf.data.Dataset:
        """Returns those of the endless, shuffled `items` that a worker makes.

        With random access these are its rows of each batch, so that the
        batches are the same for any number of workers. Otherwise each worker
        reads files of its own, an equal number of records per epoch: some
        twice if it has fewer, not all if it has more, and other files in the
        next epoch.

        Args:
            worker: which.
            start: counter of the first example of a batch.
            seed: seed of the order.
            batch_size: G, examples in a global batch.
            whole_epochs: whether each epoch ends with its last whole batch.

        Returns:
            Dataset of (counter, element for `read`).
        """
        size = self.epoch_size(batch_size, whole_epochs)
        items = self.items(
            start=start, seed=seed, shuffle=True, repeat=True, size=size
        )
        if worker.count == 1:
            return items
        rows = worker.rows(batch_size)
        if self.random_access:
            batches = items.batch(batch_size, drop_remainder=True)
            return batches.map(
                lambda *batch: tf.nest.map_structure(lambda x: x[rows], batch)
            ).unbatch()
        order = self.stream_of(
            worker, start=start // worker.count, seed=seed, size=size
        )
        counters = tf.data.Dataset.counter(start).batch(batch_size)
        mine = counters.map(lambda batch: batch[rows]).unbatch()
        return tf.data.Dataset.zip((mine, order))

    def stream_of(
        self, reader: Worker, *, start: int, seed: int, size: int
    ) -> tf.data.Dataset:
        """Returns the elements that one of several readers of a stream reads.

        Each reads files of its own, an equal number of records per epoch.

        Args:
            reader: which of them.
            start: elements that it has read before.
            seed: seed of the order.
            size: examples of all readers in an epoch.

        Returns:
            Endless dataset of elements for `read`.
        """
        share = max(1, size // reader.count)
        return _epochs(
            lambda epoch: self.epoch(seed, epoch, reader).repeat().take(share),
            size=share,
            start=start,
            stop=2**40,
        )

    def example(self, counter: tf.Tensor, item: tf.Tensor) -> Example:
        """Reads one of `items`; see `examples`."""
        found = {"counter": counter, **self.read(item)}
        found["code"] = tf.constant(headers.OK)
        if self.load:
            _, (found["bytes"], found["code"]) = attempt(
                self.load, found["bytes"], otherwise=("", headers.CLOSED)
            )
        return found

    def examples(
        self,
        *,
        start: int,
        seed: int,
        shuffle: bool,
        repeat: bool,
        size: Optional[int] = None,
    ) -> tf.data.Dataset:
        """Returns the examples of `items`, with the same arguments.

        Returns:
            Dataset of `{"counter": i64[], "name": string[], "bytes": string[],
            "label": i64[], "code": i32[]}`: `bytes` is the encoded image,
            empty if it could not be read, for the reason `code` of `headers`;
            `label` is -1 if there is none; `name` is a path or such as
            `"imagenet2012/train #123"`.
        """
        items = self.items(
            start=start,
            seed=seed,
            shuffle=shuffle,
            repeat=repeat,
            size=size,
        )
        return items.map(
            self.example,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )


def _epochs(epoch, *, size, start, stop):
    """Concatenates `epoch(e)` of `size` elements each, from element `start`."""
    first, offset = divmod(start, size)

    def rest(number):
        skipped = tf.where(number == first, tf.cast(offset, tf.int64), 0)
        return epoch(number).skip(skipped)

    return tf.data.Dataset.range(first, stop).flat_map(rest)


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
            tf.range(size, dtype=tf.int64), key(seed, ORDER, number), "philox"
        )  # [size]
        return tf.data.Dataset.from_tensor_slices(indices)

    return Source(name, size, class_names, True, epoch, read, load)
