"""A source of images, read in an order that depends on (seed, counter) only."""

import dataclasses
from typing import Callable, Dict, Optional, Tuple

import tensorflow as tf

from clsa_tf.data import headers
from clsa_tf.data.graph_calls import attempt
from clsa_tf.data.order import ORDER, Worker, key

Example = Dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Absent:
    """Takes the place of a `Source` that does not exist.

    Attributes:
        reason: why it does not exist, a clause that can follow a colon.
    """

    reason: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Where examples come from, and in which order.

    Attributes:
        name: the dataset as the user spelled it, for messages.
        size: number of examples in an epoch.
        class_names: names of the classes, by label; None without labels.
        random_access: whether any example can be read without reading the
            examples before it.
        epoch: `epoch(seed, e)` returns the dataset of epoch `e`, in order. An
            element is the key of an example or the example itself. The order
            is not shuffled if seed is None. Without random access
            `epoch(seed, e, worker)` is the part that this `Worker` reads.
        read: function from an element of that dataset to name, label and
            bytes.
        load: function from these bytes to the encoded image and `headers.OK`,
            or to "" and another code. It may fail. None if the bytes are the
            encoded image itself, not its location.
        local: why `read` or `load` works in this process only, because it
            runs Python; "" if they work in other processes, too.
        rules: how the images are decoded.
        notes: sentences about the source for the user, shown at the start.
        fingerprint: function that returns a digest of the examples and their
            order. The digest does not depend on where they are stored; see
            `clsa_tf.data.sources.fingerprint`. None if it is unknown.
        unlabelled: why there are no class names, a clause; "" if there are.
        about: how the images were chosen and labelled, a clause; "" for none.
        held_out: number of images of the same folder that are kept for
            evaluation.
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
        """Number of examples per epoch: all, or only those in full batches."""
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
        """Returns (counter i64[], element for `read`) from a counter on.

        A start in the middle of an epoch skips the elements before it: at most
        one epoch of indices (about 0.4 s per million), or of raw records if
        there is no random access. Skipped elements are not decoded.

        Args:
            start: counter of the first example.
            seed: seed of the order.
            shuffle: whether each epoch is a random permutation; otherwise the
                order is fixed.
            repeat: whether epochs follow one another forever; otherwise the
                dataset ends with counter `size - 1`.
            size: number of examples to take from each epoch; None for all.

        Returns:
            Dataset of (counter, element for `read`).
        """
        size = size or self.size

        def epoch(number):
            whole = self.epoch(seed if shuffle else None, number)
            # A stream checks its length only if it is read to its end.
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
        """Returns the part of the endless, shuffled `items` for one worker.

        With random access this is the worker's rows of each batch, so the
        batches are the same for any number of workers. Otherwise each worker
        reads its own files and takes the same number of records per epoch. It
        repeats some if its files hold fewer, and skips some if they hold more.
        The next epoch assigns other files to it.

        Args:
            worker: the worker to select for.
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
        share = max(1, size // worker.count)
        first, skipped = divmod(start // worker.count, share)
        order = self.stream_of(
            worker,
            seed=seed,
            first=first,
            skipped=skipped,
            share=lambda _: share,
        )
        counters = tf.data.Dataset.counter(start).batch(batch_size)
        mine = counters.map(lambda batch: batch[rows]).unbatch()
        return tf.data.Dataset.zip((mine, order))

    def stream_of(
        self,
        reader: Worker,
        *,
        seed: int,
        first: int,
        skipped: int,
        share: Callable,
    ) -> tf.data.Dataset:
        """Returns the part of a stream that one of several readers reads.

        In each epoch, each reader has other files of its own.

        Args:
            reader: index and number of the readers, as a `Worker`.
            seed: seed of the order.
            first: number of the first epoch.
            skipped: number of records of that epoch to skip.
            share: function of the number of an epoch that returns the number
                of its records to read. Records are repeated if the reader's
                files hold fewer, and left out if they hold more.

        Returns:
            Endless dataset of elements for `read`.
        """

        def epoch(number):
            records = self.epoch(seed, number, reader).repeat()
            return records.take(share(number))

        return _from_epoch(epoch, first, skipped, stop=2**40)

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
            "label": i64[], "code": i32[]}`. `bytes` is the encoded image. It
            is empty if the image could not be read; then `code`, one of the
            codes of `headers`, is the reason. `label` is -1 if there is none.
            `name` is a path, or for example `"imagenet2012/train #123"`.
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
    return _from_epoch(epoch, *divmod(start, size), stop=stop)


def _from_epoch(epoch, first, skipped, *, stop):
    """Concatenates `epoch(e)` for e in first, ..., stop - 1, skipping some."""

    def rest(number):
        count = tf.where(number == first, tf.cast(skipped, tf.int64), 0)
        return epoch(number).skip(count)

    return tf.data.Dataset.range(first, stop).flat_map(rest)


def indexed(name, size, class_names, read, load=None) -> Source:
    """Builds a source whose examples can be read by index.

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
        # `index_shuffle` would need no table, but for up to 20,000 examples it
        # yields only 256 different permutations (TF 2.15.1).
        indices = tf.random.experimental.stateless_shuffle(
            tf.range(size, dtype=tf.int64), key(seed, ORDER, number), "philox"
        )  # [size]
        return tf.data.Dataset.from_tensor_slices(indices)

    return Source(name, size, class_names, True, epoch, read, load)
