"""Opens datasets prepared by tensorflow-datasets."""

import dataclasses
import difflib
import os
import posixpath
import re
from typing import Union

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from clsa_tf.data.shapes import dataset as shapes
from clsa_tf.data.source import Absent, Source
from clsa_tf.data.sources import fingerprint
from clsa_tf.data.sources.records import (
    MEMORY_BYTES,
    WINDOW_RECORDS,
    Format,
    Shard,
    from_getter,
    from_shards,
)
from clsa_tf.errors import UserError, first_line

VERSION = re.compile(r"\d+\.\d+\.\d+")
NAME = re.compile(rf"(\w+)(?:/([\w.+-]+))?(?::({VERSION.pattern}))?")
ARCHIVE = re.compile(r"[\w.-]+\.(?:tar\.gz|tgz|tar|zip)\b")
INFO = "dataset_info.json"
# Common names of ImageNet with 1,000 classes. The catalogue has other datasets
# with similar names.
_IMAGENET = ("imagenet", "imagenet1k", "imagenet-1k", "ilsvrc2012")
TRAIN = "train"
EVAL_SPLITS = ("test", "validation", "val")


def open_tfds(
    dataset: str,
    *,
    split: str,
    data_dir: str,
    labels: str,
    role: str,
    download: bool = False,
    window: int = WINDOW_RECORDS,
    memory_bytes: int = MEMORY_BYTES,
) -> Union[Source, Absent]:
    """Opens a prepared dataset; downloads nothing unless `download`.

    Args:
        dataset: `name` or `name/config`, optionally with `:1.2.3`, or the
            directory of a prepared dataset.
        split: such as `"train"` or `"train[:10%]"`; empty for the default of
            the role.
        data_dir: directory of prepared datasets; empty for the default.
        labels: "auto" or "none".
        role: "train", "eval" or "bank".
        download: whether to download and prepare a missing dataset.
        window: number of records among which the order is shuffled.
        memory_bytes: largest size of a split to read into memory.

    Returns:
        A `Source`, or an `Absent` with the reason why this role has none.

    Raises:
        UserError: the dataset or split does not exist, or has no images.
    """
    builder = _builder(dataset, data_dir, download)
    form = _format(dataset, builder.info.features, labels)
    splits = builder.info.splits

    def open_split(name):
        source = _open_split(dataset, builder, name, form, window, memory_bytes)
        return _with_classes(source, builder.info.features, form, labels)

    if role == "bank":
        # Splits with other names may be a part of the training split.
        if split in ("", *EVAL_SPLITS) and TRAIN in splits:
            return open_split(TRAIN)
        return Absent(f"{split} of {dataset} may be a part of its {TRAIN}")
    if split or role == "train":
        return open_split(split or TRAIN)
    for name in EVAL_SPLITS:
        if form.label and name in splits:
            source = open_split(name)
            if source.class_names:  # ImageNet's test images have none
                return source
    if labels != "auto":
        return Absent(f"--labels={labels}")
    return Absent(
        f"{dataset} has no split {', '.join(EVAL_SPLITS[:-1])} or "
        f"{EVAL_SPLITS[-1]} with labels; name one with --eval_split"
    )


def _builder(dataset, data_dir, download):
    data_dir = os.path.expanduser(
        data_dir
        or os.environ.get("TFDS_DATA_DIR")
        or posixpath.join("~", "tensorflow_datasets")
    )
    if dataset == "shapes":
        return shapes.prepare(data_dir)
    if _is_prepared(dataset):
        return tfds.builder_from_directory(dataset)
    match = NAME.fullmatch(dataset)
    if not match:
        _check_no_folder(dataset)
        raise UserError(
            "Expected folder:PATH, tfrecord:PATTERN, a tensorflow-datasets "
            f"name or a directory with {INFO}, received {dataset}; use "
            f"{' or '.join(_near(dataset)) or 'one of these spellings'}."
        )
    directory = _find(data_dir, *match.groups())
    if directory:
        return tfds.builder_from_directory(directory)
    return _missing(dataset, match.group(1), data_dir, download)


def _find(data_dir, name, config, version):
    """Returns the directory of the newest prepared version, or None."""
    root = posixpath.join(data_dir, name)
    found = set()
    for depth in [config] if config else [None, "*"]:
        parts = [root, depth, version or "*", INFO]
        for path in _glob(posixpath.join(*filter(None, parts))):
            directory = posixpath.dirname(path)
            if VERSION.fullmatch(posixpath.basename(directory)):
                found.add(directory)
    configs = {posixpath.dirname(directory) for directory in found}
    if len(configs) > 1:
        names = sorted(f"{name}/{posixpath.basename(c)}" for c in configs)
        raise UserError(
            f"Expected one configuration of {name}, received {name}, of which "
            f"{data_dir} has several; use one of {', '.join(names)}."
        )
    return max(found, key=_version, default=None)


def _version(directory):
    return [int(n) for n in posixpath.basename(directory).split(".")]


def _glob(pattern):
    try:
        return tf.io.gfile.glob(pattern)
    except tf.errors.OpError:  # for example a missing folder or bucket
        return []


def _missing(dataset, name, data_dir, download):
    """Prepares a missing dataset, or raises `UserError` with advice."""
    _check_name(dataset, name, data_dir)
    manual = tfds.builder_cls(name).MANUAL_DOWNLOAD_INSTRUCTIONS
    by_hand = ""
    if manual:
        files = sorted(set(ARCHIVE.findall(manual)))
        place = posixpath.join(data_dir, "downloads", "manual")
        by_hand = (
            f"put {' and '.join(files) or 'the files it asks for'} (available "
            f"from its authors on request) into {place} and "
        )
    if not download:
        raise UserError(
            f"Expected {dataset} prepared in {data_dir}, received nothing "
            f"there; {by_hand}pass --download, or run `tfds build {dataset} "
            f"--data_dir={data_dir}`, or correct --data_dir."
        )
    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
        builder.download_and_prepare()
    except Exception as error:  # from the network, tfds or the dataset
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"Cannot download {dataset} into {data_dir}: "
            f"{type(error).__name__} ({reason}); {by_hand}try again."
        ) from error
    return builder


def _check_name(dataset, name, data_dir):
    if name in _known():
        return
    _check_no_folder(dataset)
    hint = "correct the name"
    if _near(name):
        hint = f"use {' or '.join(_near(name))}"
    raise UserError(
        "Expected the name of a tensorflow-datasets dataset, or of one "
        f"prepared in {data_dir}, received {dataset}; {hint}, or correct "
        "--data_dir."
    )


def _known():
    return [*tfds.list_builders(with_community_datasets=False), "shapes"]


def _near(name):
    """Returns names of datasets that are similar to `name`."""
    if name.lower() in _IMAGENET:
        return ["imagenet2012"]
    # Stricter than the default of difflib, which suggests "toto" for "photos".
    return difflib.get_close_matches(name, _known(), cutoff=0.7)


def _is_prepared(directory):
    """Returns whether a directory holds a prepared dataset."""
    try:
        return tf.io.gfile.exists(posixpath.join(directory, INFO))
    except tf.errors.OpError as e:
        raise UserError(
            f"Expected a directory with {INFO} that TensorFlow can read, "
            f"received {directory} ({first_line(e).rstrip('.')}); copy or "
            "mount it."
        ) from e


def _check_no_folder(dataset):
    """Raises `UserError` if the dataset is a folder without `folder:`."""
    if os.path.isdir(dataset):
        raise UserError(
            f"Expected folder:PATH for a folder of images, received {dataset}; "
            f"write folder:{dataset}."
        )


def _format(dataset, features, labels) -> Format:
    # A dataset may also be a single feature without a name.
    parts = dict(features.items()) if hasattr(features, "items") else {}
    image = parts.get("image")
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise UserError(
            "Expected a dataset with 8-bit images called image, received "
            f"{dataset} with {', '.join(sorted(parts))}; choose another."
        )
    has_label = isinstance(parts.get("label"), tfds.features.ClassLabel)
    return Format("image", "label" if has_label and labels == "auto" else "")


def _open_split(dataset, builder, split, form, window, memory_bytes):
    splits = builder.info.splits
    try:
        parts = splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(
            f"Expected one of the splits {', '.join(splits)} of {dataset}, or "
            f"a part such as train[:10%], received {split}; correct it."
        ) from error
    name, size = f"{dataset}/{split}", sum(part.take for part in parts)
    if not size:
        raise UserError(
            f"Expected examples in {name}, received none; choose another split."
        )
    total = sum(
        tf.io.gfile.stat(os.fspath(p.filename)).length
        * p.take
        / max(1, p.examples_in_shard)
        for p in parts
    )
    source = dict(name=name, size=size, form=form, memory=total <= memory_bytes)
    if builder.info.file_format.value == "tfrecord":
        source = from_shards(_shards(name, parts), window=window, **source)
    else:
        source = from_getter(_getter(builder, split), **source)
    return dataclasses.replace(
        source,
        fingerprint=lambda: fingerprint.of_records(
            [(os.fspath(p.filename), p.skip, p.take) for p in parts],
            builder.info.full_name,
        ),
    )


def _shards(name, parts):
    shards, number = [], 0
    for part in parts:
        path = os.fspath(part.filename)
        shards.append(Shard(path, part.skip, part.take, name, number))
        number += part.take
    return shards


def _getter(builder, split):
    """Returns a function from index to record, for array_record files."""
    try:
        return builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        ).__getitem__
    # Raised by tensorflow-datasets for files without random access.
    except NotImplementedError as error:
        form = builder.info.file_format.value
        raise UserError(
            f"Expected {builder.name} as tfrecord or array_record files, "
            f"received {form}; prepare it again with `tfds build "
            f"{builder.name} --file_format=tfrecord`."
        ) from error


def _with_classes(source, features, form, labels):
    """Adds the class names, or why there are none."""
    if not form.label:
        why = f"--labels={labels}"
        if labels == "auto":
            why = "it has no feature `label` with one class per image"
        return dataclasses.replace(source, unlabelled=why)
    first = source.examples(start=0, seed=0, shuffle=False, repeat=False)
    if next(first.as_numpy_iterator())["label"] < 0:
        why = "it was published without them (-1)"
        return dataclasses.replace(source, unlabelled=why)
    label = features[form.label]
    names = label.names or [str(i) for i in range(label.num_classes)]
    return dataclasses.replace(source, class_names=tuple(names))
