"""Writes a `tf.data.Dataset` to files, so that training on it can be resumed.

A dataset can only be read from its beginning, and its order may differ each
time. So it is read once and written to TFRecord files, which `tfrecord.py`
opens.
"""

import itertools
import json
import os
import shutil
import sys

import tensorflow as tf
import tqdm

from clsa_tf import files
from clsa_tf.data import converted, headers
from clsa_tf.data.sources.listing import SUFFIXES
from clsa_tf.data.sources.tfrecord import IMAGE_KEYS, LABEL_KEYS
from clsa_tf.errors import UserError, first_line

# Holds the number of images. It is written last, before the directory appears.
ABOUT = "about.json"
UNFINISHED = ".unfinished"
# Size of a file. Large datasets are shuffled by files first.
SHARD_BYTES = 64 * 2**20
_LONGEST_NAME = 4096  # bytes, of a path
# Characters with a meaning in patterns.
_SPECIAL = "*?[]\\,"
_IMAGES = "uint8 or float [H, W, 3], or encoded as string []"


def pattern(directory):
    """Returns the pattern of the files that `write` creates in `directory`.

    Raises:
        UserError: the path has a character with a meaning in patterns.
    """
    directory = os.path.abspath(directory)
    if set(directory) & set(_SPECIAL):
        raise UserError(
            "Expected a workdir for a tf.data.Dataset without the characters "
            f"{' '.join(_SPECIAL)} in its path, received {directory}; choose "
            "another."
        )
    return os.path.join(directory, "images-*.tfrecord")


def write(dataset, directory, *, shard_bytes=SHARD_BYTES):
    """Writes a dataset to files, unless they already exist.

    Images are stored losslessly as PNG, and encoded images unchanged. The
    directory appears only after everything is written, so an interrupted call
    leaves none. Progress goes to stderr.

    Args:
        dataset: finite `tf.data.Dataset` of single images, of (image, label)
            or of dictionaries with `"image"` and optionally `"label"`. An image
            is uint8 or float in [0, 1], `[H, W, 3]` or grey `[H, W, 1]`, or
            string `[]`, the contents of a file that `decode` reads. Labels
            are kept if they are single integers.
        directory: directory to write to.
        shard_bytes: approximate size of a file.

    Raises:
        UserError: the dataset has another form, it cannot be read to its end,
            or the directory cannot be written.
    """
    directory = os.path.abspath(directory)
    try:
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        with files.lock(directory + ".lock"):
            _write_locked(dataset, directory, shard_bytes)
    except files.Locked as e:
        raise UserError(
            "Expected a dataset that no other process is writing, received "
            f"{directory}, in use by {e}; wait for it or choose another "
            "workdir."
        ) from e
    except (OSError, tf.errors.OpError) as e:
        raise UserError(
            f"Cannot write the dataset to {directory}: {first_line(e)}; make "
            "room, fix the permissions or choose another workdir."
        ) from e


def _write_locked(dataset, directory, shard_bytes):
    size = int(dataset.cardinality())
    if os.path.exists(directory):
        _check_size(directory, size)
        print("  the dataset was written before and is not read again")
        return
    if size == tf.data.INFINITE_CARDINALITY:
        raise UserError(
            "Expected a finite tf.data.Dataset, received an infinite one; "
            "leave out repeat(), or add take()."
        )
    read, words = _reader(dataset.element_spec)
    examples = dataset.map(
        read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    print(f"  writing the dataset to {directory} {words}")
    unfinished = directory + UNFINISHED
    # Removes the files of a killed process.
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        os.mkdir(unfinished)
        count = _write_files(_read(examples, size), unfinished, shard_bytes)
        about = json.dumps({"images": count}) + "\n"
        files.write_atomically(os.path.join(unfinished, ABOUT), about)
        files.publish(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_size(directory, size):
    """Raises `UserError` if the number of images differs from the files."""
    path = os.path.join(directory, ABOUT)
    try:
        with open(path, encoding="utf-8") as file:
            before = int(json.load(file)["images"])
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(
            f"Expected a dataset that was written to {directory}, received "
            f"something else ({first_line(e)}); remove it or choose another "
            "workdir."
        ) from e
    if size not in (before, tf.data.UNKNOWN_CARDINALITY):
        raise UserError(
            f"Expected the tf.data.Dataset of {before} images that was written "
            f"to {directory}, received one of {size}; choose another workdir."
        )


# ---- From elements to bytes


def _reader(spec):
    """Returns how to read elements of `spec`, and what happens to the labels.

    Returns:
        (function from an element to (encoded string[], label i64[], lowest
        value f32[], highest value f32[]); text about the labels).
    """
    image, label = _pick(spec, spec)
    form = _form(image)
    labelled = _is_label(label)

    def read(*element):
        # Only tuples are passed as several arguments.
        element = element if isinstance(spec, tuple) else element[0]
        image, label = _pick(element, spec)
        low = high = tf.constant(0.0)
        if form != "encoded":
            image = tf.ensure_shape(image, [None, None, None])
        if form == "float":
            image = tf.cast(image, tf.float32)
            low, high = tf.reduce_min(image), tf.reduce_max(image)
            image = tf.cast(tf.round(image * 255.0), tf.uint8)
        if form != "encoded":
            image = tf.io.encode_png(image)
        label = tf.reshape(label, []) if labelled else -1
        return tf.ensure_shape(image, []), tf.cast(label, tf.int64), low, high

    if labelled:
        return read, "with its labels"
    return read, "without labels" + (
        "" if label is None else ", because they are not single integers"
    )


def _pick(element, spec):
    """Returns (image, label) of an element; label is None without labels."""
    if isinstance(spec, dict) and "image" in spec:
        return element["image"], element.get("label")
    if isinstance(spec, tuple) and len(spec) in (1, 2):
        return element[0], element[1] if len(spec) == 2 else None
    if isinstance(spec, tf.TensorSpec):
        return element, None
    raise UserError(
        "Expected a tf.data.Dataset of images, of (image, label) or of "
        f'dictionaries with "image", received elements {spec}; map() them to '
        "one of these."
    )


def _is_label(spec):
    # Labels in keras.datasets have shape [1], not [].
    return (
        isinstance(spec, tf.TensorSpec)
        and spec.dtype.is_integer
        and spec.shape.num_elements() == 1
    )


def _form(spec):
    """Returns "encoded", "float" or "uint8"; raises `UserError` otherwise."""
    received = f"{spec}"
    if isinstance(spec, tf.TensorSpec):
        received = f"{spec.dtype.name} {spec.shape}"
        encoded, floating = spec.dtype == tf.string, spec.dtype.is_floating
        rank = 0 if encoded else 3
        if spec.shape.rank == rank + 1:
            raise UserError(
                f"Expected single images, {_IMAGES}, received batches, "
                f"{received}; leave out batch(), or add unbatch()."
            )
        channels = spec.shape[2] if spec.shape.rank == 3 else None
        if (
            (encoded or floating or spec.dtype == tf.uint8)
            and spec.shape.rank in (None, rank)
            and channels in (None, 1, 3)
        ):
            return "encoded" if encoded else "float" if floating else "uint8"
    raise UserError(
        f"Expected images, {_IMAGES}, received {received}; convert them "
        "with map()."
    )


def _read(examples, size):
    """Yields (encoded, label) of each example, and shows progress."""
    bar = tqdm.tqdm(
        total=size if size > 0 else None,
        unit="images",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
    count = 0
    with bar:
        try:
            for encoded, label, low, high in examples.as_numpy_iterator():
                if not (low >= 0 and high <= 1):  # nor NaN
                    raise UserError(
                        "Expected float images in [0, 1], received values from "
                        f"{low:g} to {high:g} in image {count}; scale them, "
                        "or cast values in 0..255 to uint8."
                    )
                if not count:
                    _check_content(encoded)
                yield encoded, int(label)
                count += 1
                bar.update()
        except tf.errors.OpError as e:
            raise UserError(
                f"Cannot read the tf.data.Dataset after {count} images: "
                f"{first_line(e)}; correct it."
            ) from e
    if not count:
        raise UserError(
            "Expected a tf.data.Dataset with images, received an empty one; "
            "check how it is made."
        )


def _check_content(encoded):
    """Raises `UserError` for a file name instead of the file's contents."""
    if headers.kind(encoded[: headers.HEAD]) or len(encoded) > _LONGEST_NAME:
        return
    name = encoded.decode("utf-8", "replace")
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES or suffix in converted.SUFFIXES:
        raise UserError(
            "Expected the contents of image files, as string [], received "
            f"a string that looks like a file name, {name!r}; read the files: "
            "dataset.map(tf.io.read_file), or, with labels, dataset.map("
            "lambda name, label: (tf.io.read_file(name), label))."
        )


# ---- From bytes to files


def _write_files(examples, directory, shard_bytes):
    """Writes the examples to files; returns the number of images."""
    count = 0
    for number in itertools.count():
        first = next(examples, None)
        if first is None:
            return count
        path = os.path.join(directory, f"images-{number:05d}.tfrecord")
        rest = itertools.chain([first], examples)
        count += _write_file(rest, path, shard_bytes)


def _write_file(examples, path, shard_bytes):
    """Writes one file, up to its size; returns the number of images."""
    count = written = 0
    with tf.io.TFRecordWriter(path) as writer:
        for encoded, label in examples:
            record = _record(encoded, label)
            writer.write(record)
            count, written = count + 1, written + len(record)
            if written >= shard_bytes:
                break
    return count


def _record(encoded, label):
    image = tf.train.BytesList(value=[encoded])
    label = tf.train.Int64List(value=[label])  # -1: none
    features = {
        IMAGE_KEYS[0]: tf.train.Feature(bytes_list=image),
        LABEL_KEYS[0]: tf.train.Feature(int64_list=label),
    }
    return tf.train.Example(
        features=tf.train.Features(feature=features)
    ).SerializeToString()
