"""A folder of images as a source."""

import dataclasses
import hashlib
import os
import posixpath
from typing import List, Optional, Tuple

import numpy as np
import tensorflow as tf

from clsa_tf.data import fingerprint
from clsa_tf.data.order import Source, indexed
from clsa_tf.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
TRAIN = "train"
EVAL = ("test", "val", "validation")


def list_images(root: str) -> Tuple[List[str], int]:
    """Lists the images anywhere below a folder.

    Hidden files and folders are passed over, links are followed.

    Args:
        root: a local path or a URL that `tf.io.gfile` knows.

    Returns:
        (paths below root, with "/" and sorted; number of other files).
    """
    images, others = [], 0
    for folder, files in _walk(root):
        for name in files:
            path = posixpath.join(folder, name)
            if path.startswith(".") or "/." in path:
                continue
            if path.lower().endswith(SUFFIXES):
                images.append(path)
            else:
                others += 1
    return sorted(images), others


def _walk(root):
    """Yields (folder below root, names of the files in it)."""
    if "://" in root:
        for folder, _, files in tf.io.gfile.walk(root):
            yield folder[len(root) :].strip("/"), files
        return
    # Five times faster, as it needs no call per file, and any name will do.
    visited = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        yield "" if below == "." else below, files
        visited.add(os.path.realpath(folder))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            # A link upwards would never end.
            and os.path.realpath(os.path.join(folder, name)) not in visited
        ]


def classes(paths: List[str]) -> Optional[Tuple[str, ...]]:
    """Returns the class names, or None if the folder is not labelled.

    It is if every image lies below one of at least two first-level folders.

    Args:
        paths: as from `list_images`.
    """
    if any("/" not in path for path in paths):
        return None
    names = sorted({path.split("/")[0] for path in paths})
    return tuple(names) if len(names) > 1 else None


def held_out(path: str, share: float) -> bool:
    """Tells whether an image is kept for evaluation, by a hash of its path.

    Args:
        path: path below the root of the folder.
        share: expected share of such images, in [0, 1].
    """
    digest = hashlib.sha256(os.fsencode(path)).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def open_folder(
    root: str, *, split: str, labels: str, holdout: float, role: str
) -> Optional[Source]:
    """Opens a folder; see `sources.open_source` for the rules.

    Args:
        root: the folder.
        split: name of a folder directly below root; empty for the usual one.
        labels: "auto" or "none".
        holdout: share of a labelled folder kept for evaluation.
        role: "train" or "eval".

    Returns:
        A `Source`, or None if there is nothing to evaluate on.

    Raises:
        UserError: there is no such folder, split, or no image in it.
    """
    _check_folder(root)
    paths, others = list_images(root)
    if not paths:
        raise UserError(
            f"Expected images ({' '.join(SUFFIXES)}) in {root}, received "
            f"{f'{others} other' if others else 'no'} files; name a folder "
            "with images in or below it."
        )
    prefix, class_names = _choose(root, paths, split, labels, role)
    if role == "eval" and not (prefix is not None and class_names):
        return None
    chosen = [path for path in paths if path.startswith(prefix)]
    if class_names and not prefix:
        chosen = [
            path
            for path in chosen
            if held_out(path, holdout) == (role == "eval")
        ]
    if not chosen and role == "train":
        raise UserError(
            f"Expected images to train on in {root}, received none that "
            f"--holdout={holdout:g} leaves; lower it."
        )
    return _source(root, prefix, chosen, class_names) if chosen else None


def _check_folder(root):
    if not tf.io.gfile.exists(root):
        raise UserError(
            f"Expected a folder of images, received {root}, which does not "
            "exist; check the path."
        )
    if not tf.io.gfile.isdir(root):
        raise UserError(
            f"Expected a folder of images, received the file {root}; name the "
            "folder it is in."
        )


def _choose(root, paths, split, labels, role):
    """Returns (what the paths begin with, class names), (None, …) if none."""
    groups = {}
    for path in paths:
        first, slash, rest = path.partition("/")
        if slash:
            groups.setdefault(first, []).append(rest)
    known = [name for name in (TRAIN, *EVAL) if name in groups]
    if TRAIN not in known or len(known) == 1:  # one split, the whole folder
        if split not in ("", TRAIN):
            raise UserError(
                f"Expected the split {TRAIN} of {root}, which has no folders "
                f"{TRAIN} and {' or '.join(EVAL)}, received {split}; leave "
                "the split empty."
            )
        return "", classes(paths) if labels == "auto" else None
    if split not in ("", *known):
        raise UserError(
            f"Expected one of the splits {', '.join(known)} of {root}, "
            f"received {split}; choose one of them."
        )
    class_names = classes(groups[TRAIN]) if labels == "auto" else None
    if not split and role == "train":
        split = TRAIN
    if not split:
        # ImageNet's test images have no labels; evaluate on val then.
        labelled = [name for name in known[1:] if classes(groups[name])]
        split = labelled[0] if labelled else None
    if split and class_names:
        _check_classes(root, split, classes(groups[split]), class_names)
    return f"{split}/" if split else None, class_names


def _check_classes(root, split, found, class_names):
    unknown = sorted(set(found or ()) - set(class_names))
    if unknown or not found:
        raise UserError(
            f"Expected in {root}/{split} the class folders of {root}/{TRAIN}, "
            f"received {', '.join(unknown[:3]) or 'none'}; make the folder "
            "names agree, or pass --labels=none."
        )


def _source(root, prefix, chosen, class_names):
    labels = np.full([len(chosen)], -1, np.int64)
    if class_names:
        number = {name: i for i, name in enumerate(class_names)}
        for i, path in enumerate(chosen):
            labels[i] = number[path[len(prefix) :].split("/")[0]]
    with tf.device("CPU:0"):
        labels = tf.constant(labels)  # [n]
        # Bytes, because file names need not be valid text.
        files = tf.constant(
            [os.fsencode(posixpath.join(root, path)) for path in chosen]
        )  # [n]

    def read(index):
        name = files[index]
        return {"name": name, "bytes": name, "label": labels[index]}

    source = indexed(
        f"folder:{root}", len(chosen), class_names, read, tf.io.read_file
    )
    return dataclasses.replace(
        source, fingerprint=lambda: fingerprint.of_files(root, chosen)
    )
