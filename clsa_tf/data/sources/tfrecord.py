"""Opens TFRecord files of `tf.train.Example` that match a pattern."""

import dataclasses
from typing import Tuple

import tensorflow as tf

from clsa_tf.data.graph_calls import attempt
from clsa_tf.data.source import Source
from clsa_tf.data.sources import fingerprint
from clsa_tf.data.sources.records import (
    MEMORY_BYTES,
    WINDOW_RECORDS,
    Format,
    Shard,
    from_shards,
)
from clsa_tf.errors import UserError, first_line

IMAGE_KEYS = ("image/encoded", "image")
LABEL_KEYS = ("image/class/label", "label")
MAX_CLASSES = 1_000_000  # a larger label is an identifier, not a class


def open_tfrecords(
    pattern: str,
    *,
    labels: str,
    num_examples: int,
    window: int = WINDOW_RECORDS,
    memory_bytes: int = MEMORY_BYTES,
) -> Source:
    """Opens TFRecord files.

    Args:
        pattern: path of the files with `*`, or several separated by commas.
        labels: "auto" (the label in the records, if any) or "none".
        num_examples: number of records; 0 to count them, which reads all
            files. If it is given for large files, there are no class names,
            because classes are counted in the same pass.
        window: number of records among which the order is shuffled.
        memory_bytes: largest size of the files to read them into memory.

    Returns:
        A `Source`. The names of its classes are their numbers.

    Raises:
        UserError: no files match, or their content is not as expected.
    """
    paths = _match(pattern)
    form = _find_format(paths, use_label=labels == "auto")
    shards = [Shard(path, 0, -1, path, 0) for path in paths]
    small = sum(tf.io.gfile.stat(p).length for p in paths) <= memory_bytes
    highest = -1
    size = num_examples
    counted = small or not num_examples
    if counted:
        size, highest = _count(paths, form)
        if num_examples not in (0, size):
            raise UserError(
                f"Expected {num_examples} records in {pattern}, received "
                f"{size}; correct --num_examples, or leave it 0."
            )
    classes = highest + 1 if highest < MAX_CLASSES else 0
    class_names = tuple(str(i) for i in range(classes)) or None
    unlabelled = ""
    if not class_names:
        unlabelled = _why_unlabelled(form, labels, counted, highest)
    source = from_shards(
        shards,
        name=f"tfrecord:{pattern}",
        size=size,
        form=form,
        window=window,
        memory=small,
    )
    return dataclasses.replace(
        source,
        class_names=class_names,
        unlabelled=unlabelled,
        fingerprint=lambda: fingerprint.of_records(
            [(path, 0, -1) for path in paths], form.label
        ),
    )


def _why_unlabelled(form, labels, counted, highest):
    """Returns why there are no classes, a clause."""
    if labels != "auto":
        return f"--labels={labels}"
    if not form.label:
        return f"its records have no integer {' or '.join(LABEL_KEYS)}"
    if not counted:
        return (
            "classes are counted by reading all records, which --num_examples "
            "skips"
        )
    if highest < 0:
        return f"{form.label} is negative in all records"
    return f"labels up to {highest} are too large to be classes"


def _match(pattern):
    paths, why = [], ""
    for part in pattern.split(","):
        try:
            paths += tf.io.gfile.glob(part)
        except tf.errors.NotFoundError:  # a missing folder or bucket
            continue
        except tf.errors.OpError as e:
            why = f" ({first_line(e).rstrip('.')})"
    if not paths:
        raise UserError(
            f"Expected TFRecord files, received the pattern {pattern}, which "
            f"matches no file{why}; check it, and quote it in the shell."
        )
    return sorted(paths)


def _find_format(paths, use_label):
    """Finds the keys of image and label in the first record."""
    record = _first_record(paths)
    try:
        features = tf.train.Example.FromString(record).features.feature
    except Exception as error:  # protobuf's DecodeError has no public name
        raise UserError(
            "Expected records of tf.train.Example, received other records in "
            f"{paths[0]}; convert the files."
        ) from error
    kinds = {name: f.WhichOneof("kind") for name, f in features.items()}
    images = [k for k in IMAGE_KEYS if kinds.get(k) == "bytes_list"]
    if not images:
        raise UserError(
            f"Expected records with encoded images as {' or '.join(IMAGE_KEYS)}"
            f", received {', '.join(sorted(kinds)) or 'empty ones'} in "
            f"{paths[0]}; convert the files."
        )
    label_keys = [k for k in LABEL_KEYS if kinds.get(k) == "int64_list"]
    return Format(images[0], label_keys[0] if label_keys and use_label else "")


def _first_record(paths):
    for path in paths:
        try:
            for record in tf.data.TFRecordDataset(path).take(1):
                return record.numpy()
        except tf.errors.OpError as error:
            raise _damaged([path]) from error
    raise UserError(
        f"Expected records in {', '.join(paths[:3])}, received none; check "
        "how the files were written."
    )


def _damaged(paths):
    return UserError(
        f"Expected complete TFRecord files, received {', '.join(paths[:3])}, "
        f"which cannot be read to the end; write or copy {len(paths)} of the "
        "files again."
    )


def _count(paths, form) -> Tuple[int, int]:
    """Reads all records; returns (number of records, highest label)."""

    def totals(path):
        labels = tf.data.TFRecordDataset(path).map(lambda r: form.parse(r)[1])
        return labels.reduce(
            (tf.constant(0, tf.int64), tf.constant(-1, tf.int64)),
            lambda state, x: (state[0] + 1, tf.maximum(state[1], x)),
        )

    nothing = (tf.constant(0, tf.int64), tf.constant(-1, tf.int64))
    files = tf.data.Dataset.from_tensor_slices(paths).map(
        lambda path: attempt(totals, path, otherwise=nothing),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    size, highest, damaged = 0, -1, []
    for path, (worked, (n, label)) in zip(paths, files.as_numpy_iterator()):
        size += int(n)
        highest = max(highest, int(label))
        if not worked:
            damaged.append(path)
    if damaged:
        raise _damaged(damaged)
    return size, highest
