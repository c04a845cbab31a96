"""Sources of record files, in memory or streamed in a shuffled order."""

import dataclasses
from typing import Callable, Sequence, Tuple

import numpy as np
import tensorflow as tf

from clsa_tf.data.graph_calls import in_python
from clsa_tf.data.order import ALONE, SHARDS, WINDOW, key
from clsa_tf.data.source import Source, indexed

WINDOW_RECORDS = 16_384  # about 1.8 GB for ImageNet
MEMORY_BYTES = 512 * 2**20  # smaller datasets are read into memory once
CYCLE, BLOCK, BUFFER_BYTES = 16, 16, 2**20  # of interleaved files


@dataclasses.dataclass(frozen=True)
class Format:
    """Keys of the encoded image and of the label ("" if none) in a record."""

    image: str
    label: str

    def parse(self, record) -> Tuple[tf.Tensor, tf.Tensor]:
        """Returns (bytes string[], label i64[]) of a record string[]."""
        spec = {self.image: tf.io.FixedLenFeature([], tf.string, "")}
        if self.label:
            spec[self.label] = tf.io.FixedLenFeature([], tf.int64, -1)
        parsed = tf.io.parse_single_example(record, spec)
        label = parsed.get(self.label, tf.constant(-1, tf.int64))
        return parsed[self.image], label


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a record file.

    Attributes:
        path: path of the file.
        skip: number of records before the part.
        take: number of records in the part; -1 for all.
        name: prefix of the names of its examples, before " #<number>".
        number: number of its first example.
    """

    path: str
    skip: int
    take: int
    name: str
    number: int


def from_shards(
    shards: Sequence[Shard],
    *,
    name: str,
    size: int,
    form: Format,
    window: int,
    memory: bool,
) -> Source:
    """Builds a source from record files whose number of records is known.

    Args:
        shards: the files, in a fixed order.
        name: see `Source`.
        size: see `Source`.
        form: keys of the records.
        window: number of records among which the order is shuffled.
        memory: whether to read everything into memory now.

    Returns:
        A `Source` without class names. In memory it has random access.
        Otherwise each epoch permutes the files, interleaves them and shuffles
        the records within a moving window. An epoch whose number of records is
        not `size` ends with a `tf.errors.FailedPreconditionError`.
    """

    def epoch(seed, number, worker=None):
        stream = _stream(shards, seed, number, window, worker or ALONE)
        if worker:  # its number of records is unknown
            return stream
        return stream.apply(tf.data.experimental.assert_cardinality(size))

    def read(item):
        return _example(item["name"], item["number"], item["record"], form)

    source = Source(name, size, None, False, epoch, read)
    return in_memory(source) if memory else source


def from_getter(
    get: Callable[[int], bytes],
    *,
    name: str,
    size: int,
    form: Format,
    memory: bool,
) -> Source:
    """Builds a source from files whose records can be read by number.

    Args:
        get: function from a number in [0, size) to a record.
        name: see `Source`.
        size: see `Source`.
        form: keys of the records.
        memory: whether to read everything into memory now.

    Returns:
        A `Source` without class names, with random access.
    """

    def read(index):
        record = in_python(
            lambda i: get(int(i)), [index], tf.string, stateful=False
        )
        return _example(name, index, tf.ensure_shape(record, []), form)

    source = dataclasses.replace(
        indexed(name, size, None, read),
        local=(
            "whose records only this process can look up; prepare it as "
            "tfrecord, or"
        ),
    )
    return in_memory(source) if memory else source


def in_memory(source: Source) -> Source:
    """Reads a source into memory; returns it with random access."""
    examples = source.examples(start=0, seed=0, shuffle=False, repeat=False)
    batches = list(examples.batch(1024).as_numpy_iterator())
    with tf.device("CPU:0"):
        table = {
            field: tf.constant(np.concatenate([b[field] for b in batches]))
            for field in ("name", "bytes", "label")
        }  # [n] each

    def read(index):
        return {field: column[index] for field, column in table.items()}

    return indexed(source.name, source.size, source.class_names, read)


def _example(name, number, record, form):
    contents, label = form.parse(record)
    name = tf.strings.join([name, " #", tf.strings.as_string(number)])
    return {"name": name, "bytes": contents, "label": label}


def _stream(shards, seed, epoch, window, worker):
    """Returns the dataset of {name, number, record} of one epoch and worker."""
    fields = {
        field.name: tf.constant([getattr(s, field.name) for s in shards])
        for field in dataclasses.fields(Shard)
    }  # [number of shards] each
    if seed is not None:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(shards)), key(seed, SHARDS, epoch), "philox"
        )
        fields = {name: tf.gather(f, order) for name, f in fields.items()}
    by_file = len(shards) >= worker.count
    if by_file:
        mine = slice(worker.index, None, worker.count)
        fields = {name: f[mine] for name, f in fields.items()}

    def records(shard):
        lines = tf.data.TFRecordDataset(shard["path"], buffer_size=BUFFER_BYTES)
        lines = lines.skip(tf.cast(shard["skip"], tf.int64))
        lines = lines.take(tf.cast(shard["take"], tf.int64))
        return lines.enumerate(tf.cast(shard["number"], tf.int64)).map(
            lambda i, line: {"name": shard["name"], "number": i, "record": line}
        )

    result = tf.data.Dataset.from_tensor_slices(fields).interleave(
        records,
        cycle_length=min(CYCLE, len(shards)),
        block_length=BLOCK,
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    if not by_file:  # too few files: reads all of them and keeps a share
        result = result.shard(worker.count, worker.index)
    if seed is None:
        return result
    # Dataset.shuffle mixes its seed with the global seed. In the function of a
    # dataset, set_seed sets the global seed for that function only.
    if tf.executing_eagerly():
        raise RuntimeError("Expected a function of a dataset, received eager.")
    tf.random.set_seed(1)
    draw = tf.random.stateless_uniform(
        [], key(seed, WINDOW, epoch), None, None, tf.int64, alg="philox"
    )
    return result.shuffle(window, draw, reshuffle_each_iteration=False)
