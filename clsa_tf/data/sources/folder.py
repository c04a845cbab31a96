"""A folder of images as a source."""

import dataclasses
import hashlib
import os
import posixpath
from typing import List, Optional, Tuple, Union

import numpy as np
import tensorflow as tf

from clsa_tf.data import converted, headers
from clsa_tf.data.graph_calls import in_python
from clsa_tf.data.source import Absent, Source, indexed
from clsa_tf.data.sources import fingerprint
from clsa_tf.data.sources.listing import Listing, list_images
from clsa_tf.errors import UserError, first_line
from clsa_tf.text import listed

TRAIN = "train"
EVAL = ("test", "val", "validation")
# Prefix of the path of a file that TensorFlow cannot decode. No path has it.
_CONVERT = b"\0"


def classes(paths: List[str]) -> Optional[Tuple[str, ...]]:
    """Returns the class names, or None if the folder is not labelled.

    A folder is labelled if every image is in one of at least two first-level
    folders.

    Args:
        paths: paths as from `list_images`.
    """
    if any("/" not in path for path in paths):
        return None
    names = sorted({path.split("/")[0] for path in paths})
    return tuple(names) if len(names) > 1 else None


def why_unlabelled(paths: List[str]) -> str:
    """Returns why `classes` finds no classes in paths; "" if it finds some."""
    beside = [path for path in paths if "/" not in path]
    folders = sorted({path.split("/")[0] for path in paths if "/" in path})
    if not folders:
        return "there are no folders in it that could be classes"
    if len(folders) == 1:
        return (
            "labels need at least two class folders, and it has one "
            f"({listed(folders)})"
        )
    if not beside:
        return ""
    what = "1 image lies" if len(beside) == 1 else f"{len(beside)} images lie"
    return (
        f"{what} beside its {len(folders)} folders ({listed(beside, most=1)}); "
        "if these are classes, move every image into one"
    )


def held_out(path: str, share: float) -> bool:
    """Returns whether an image is held out for evaluation.

    A hash of its path decides.

    Args:
        path: path below the root of the folder.
        share: expected share of held-out images, in [0, 1].
    """
    digest = hashlib.sha256(os.fsencode(path)).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def open_folder(
    root: str,
    *,
    split: str,
    labels: str,
    holdout: float,
    role: str,
    rules: headers.Rules,
) -> Union[Source, Absent]:
    """Opens a folder; see `sources.open_source` for the rules.

    Args:
        root: the folder.
        split: name of a folder directly below root; empty for the default of
            the role.
        labels: "auto" or "none".
        holdout: share of a labelled folder that is kept for evaluation.
        role: "train", "eval" or "bank".
        rules: how files are read.

    Returns:
        A `Source`, or an `Absent` with the reason why this role has none.

    Raises:
        UserError: the folder or the split does not exist, or has no images.
    """
    listing = list_folder(root, more_formats=rules.more_formats)
    paths = listing.images
    splits = _splits(paths)

    def source(prefix, chosen, class_names, **words):
        return _source(
            root, prefix, chosen, class_names, listing, rules, **words
        )

    if splits:
        return _open_split(
            source, root, len(paths), splits, split, labels, role
        )
    if split not in ("", TRAIN):
        raise UserError(
            f"Expected the split {TRAIN} of {root}, which has no folders "
            f"{TRAIN} and {' or '.join(EVAL)}, received {split}; leave "
            "the split empty."
        )
    if role == "bank":
        return Absent(f"{root} has no split folders")
    return _open_whole(source, root, paths, labels, holdout, role)


def list_folder(root: str, *, more_formats: bool) -> Listing:
    """Lists the images of a folder that has at least one.

    Args:
        root: see `list_images`.
        more_formats: see `list_images`.

    Raises:
        UserError: the folder does not exist, or has no images.
    """
    _check_folder(root)
    listing = list_images(root, more_formats=more_formats)
    if not listing.images:
        others = listing.describe()
        raise UserError(
            f"Expected images in {root}, received "
            f"{f'other files: {others}' if others else 'no files'}; pass a "
            "folder with images in or below it."
        )
    return listing


def _check_folder(root):
    try:
        exists = tf.io.gfile.exists(root)
    except tf.errors.UnimplementedError as e:
        schemes = tf.io.gfile.get_registered_schemes()
        known = ", ".join(sorted(f"{name}://" for name in schemes if name))
        raise UserError(
            f"Expected a local folder of images, or one of {known}, received "
            f"{root}, which TensorFlow cannot read; copy or mount it."
        ) from e
    except tf.errors.OpError as e:
        raise UserError(
            f"Expected a folder of images, received {root}, which cannot be "
            f"read: {first_line(e).rstrip('.')}; check the path and the "
            "permissions."
        ) from e
    if not exists:
        received = f"{root}, which does not exist" if root else "no path"
        raise UserError(
            f"Expected a folder of images, received {received}; check the path."
        )
    if not tf.io.gfile.isdir(root):
        raise UserError(
            f"Expected a folder of images, received the file {root}; pass the "
            "folder that holds it."
        )


def _splits(paths):
    """Returns {split: images in its folder}; empty without splits."""
    groups = {}
    for path in paths:
        first, slash, rest = path.partition("/")
        if slash:
            groups.setdefault(first, []).append(rest)
    known = [name for name in (TRAIN, *EVAL) if name in groups]
    if TRAIN not in known or len(known) == 1:
        return {}
    return {name: groups[name] for name in known}


def _labels(paths, labels):
    """Returns (class names, "") or (None, why there are none)."""
    if labels != "auto":
        return None, f"--labels={labels}"
    return classes(paths), why_unlabelled(paths)


def _open_whole(source, root, paths, labels, holdout, role):
    """Opens a folder without splits."""
    names, why = _labels(paths, labels)
    if not names:
        if role == "eval":
            return Absent(f"no labels in {root}: {why}")
        return source("", paths, None, unlabelled=why)
    held = [held_out(path, holdout) for path in paths]
    chosen = [p for p, kept in zip(paths, held) if kept == (role == "eval")]
    if not chosen and role == "eval":
        return Absent(
            f"--holdout={holdout:g} keeps none of the {len(paths)} images of "
            f"{root}"
        )
    if not chosen:
        raise UserError(
            f"Expected training images in {root}, received none, because "
            f"--holdout={holdout:g} holds all of them out; lower it."
        )
    about = f"folders are used as {len(names)} classes ({listed(names)})"
    return source("", chosen, names, about=about, held_out=sum(held))


def _open_split(source, root, images, splits, split, labels, role):
    """Opens one split of a folder that has a folder for each split."""
    if split not in ("", *splits):
        raise UserError(
            f"Expected one of the splits {', '.join(splits)} of {root}, "
            f"received {split}; choose one of them."
        )
    names, why = _labels(splits[TRAIN], labels)
    if role == "bank" and split == TRAIN:
        return Absent(f"{TRAIN} of {root} is the evaluation split itself")
    if role == "bank" or (role == "train" and not split):
        split = TRAIN
    if not split:
        # ImageNet's test images have no labels. Then use val.
        others = [name for name in splits if name != TRAIN]
        labelled = [name for name in others if classes(splits[name])]
        if not labelled and labels == "auto":
            reasons = (
                f"{root}/{name}, {why_unlabelled(splits[name])}"
                for name in others
            )
            return Absent(f"no labels in {'; nor in '.join(reasons)}")
        split = (labelled or others)[0]
    if names:
        _check_classes(root, split, splits[split], names)
    elif split != TRAIN:  # this split may have labels even so
        names, why = _labels(splits[split], labels)
    if role == "eval" and not names:
        return Absent(f"no labels in {root}/{split}: {why}")
    about = (
        f"training uses the {len(splits[split])} of {images} images in the "
        f"folder {split}"
    )
    if names:
        about += f"; folders are used as {len(names)} classes "
        about += f"({listed(names)})"
    chosen = [f"{split}/{path}" for path in splits[split]]
    return source(f"{split}/", chosen, names, unlabelled=why, about=about)


def _check_classes(root, split, paths, class_names):
    found = classes(paths)
    unknown = sorted(set(found or ()) - set(class_names))
    if unknown or not found:
        received = ", ".join(unknown[:3]) or f"none: {why_unlabelled(paths)}"
        raise UserError(
            f"Expected in {root}/{split} the class folders of {root}/{TRAIN}, "
            f"received {received}; make the folder names agree, or pass "
            "--labels=none."
        )


def _source(root, prefix, chosen, class_names, listing, rules, **words):
    labels = np.full([len(chosen)], -1, np.int64)
    if class_names:
        number = {name: i for i, name in enumerate(class_names)}
        for i, path in enumerate(chosen):
            labels[i] = number[path[len(prefix) :].split("/")[0]]
    # Bytes, because file names may not be valid text.
    files = [os.fsencode(posixpath.join(root, path)) for path in chosen]
    places = [
        _CONVERT + file if path in listing.converted else file
        for file, path in zip(files, chosen)
    ]
    with tf.device("CPU:0"):
        labels = tf.constant(labels)  # [n]
        files, places = tf.constant(files), tf.constant(places)  # [n]

    def read(index):
        return {
            "name": files[index],
            "bytes": places[index],
            "label": labels[index],
        }

    converts = sum(path in listing.converted for path in chosen)
    load = _loader(rules) if converts else _load
    source = indexed(f"folder:{root}", len(chosen), class_names, read, load)
    if converts:
        words["local"] = (
            f"which has WebP, TIFF, HEIC or AVIF files ({converts}) that only "
            "this process can read; convert them to JPEG or PNG, leave them "
            "out with --nomore_formats, or"
        )
    return dataclasses.replace(
        source,
        notes=tuple(listing.notes(root)),
        fingerprint=lambda: fingerprint.of_files(root, chosen),
        **words,
    )


def _load(place):
    return tf.io.read_file(place), tf.constant(headers.OK)


def _loader(rules):
    """Returns a function that also loads files that only Pillow can read."""

    def read(path):
        content, code = converted.read(path, rules)
        return content, np.int32(code)

    def convert(place):
        content, code = in_python(
            read,
            [tf.strings.substr(place, len(_CONVERT), -1)],
            (tf.string, tf.int32),
            stateful=False,
        )
        return tf.ensure_shape(content, []), tf.ensure_shape(code, [])

    def load(place):
        return tf.cond(
            tf.strings.substr(place, 0, len(_CONVERT)) == _CONVERT,
            lambda: convert(place),
            lambda: _load(place),
        )

    return load
