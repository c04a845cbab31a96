"""A folder of images as a source."""

import hashlib
import os
import posixpath
from dataclasses import replace
from typing import List, Optional, Tuple

import numpy as np
import tensorflow as tf

from clsa_tf.data import converted, headers
from clsa_tf.data.listing import Listing, list_images
from clsa_tf.data.order import Source, indexed
from clsa_tf.errors import UserError, first_line

TRAIN = "train"
EVAL = ("test", "val", "validation")
# Before the path of a file that TensorFlow cannot decode; no path has it.
_CONVERT = b"\0"


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
    root: str,
    *,
    split: str,
    labels: str,
    holdout: float,
    role: str,
    rules: headers.Rules,
) -> Optional[Source]:
    """Opens a folder; see `sources.open_source` for the rules.

    Args:
        root: the folder.
        split: name of a folder directly below root; empty for the usual one.
        labels: "auto" or "none".
        holdout: share of a labelled folder kept for evaluation.
        role: "train" or "eval".
        rules: how files are read.

    Returns:
        A `Source`, or None if there is nothing to evaluate on.

    Raises:
        UserError: there is no such folder, split, or no image in it.
    """
    listing = list_folder(root, more_formats=rules.more_formats)
    paths = listing.images
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
    if not chosen:
        return None
    return _source(root, prefix, chosen, class_names, listing, rules)


def list_folder(root: str, *, more_formats: bool) -> Listing:
    """Lists the images of a folder, at least one.

    Args:
        root: see `list_images`.
        more_formats: likewise.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    _check_folder(root)
    listing = list_images(root, more_formats=more_formats)
    if not listing.images:
        others = listing.describe()
        raise UserError(
            f"Expected images in {root}, received "
            f"{f'other files: {others}' if others else 'no files'}; name a "
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


def _source(root, prefix, chosen, class_names, listing, rules):
    labels = np.full([len(chosen)], -1, np.int64)
    if class_names:
        number = {name: i for i, name in enumerate(class_names)}
        for i, path in enumerate(chosen):
            labels[i] = number[path[len(prefix) :].split("/")[0]]
    # Bytes, because file names need not be valid text.
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
        local = (
            f"which has WebP, TIFF, HEIC or AVIF files ({converts}) that only "
            "this process can read; convert them to JPEG or PNG, leave them "
            "out with --nomore_formats, or"
        )
        source = replace(source, local=local)
    return replace(source, notes=tuple(listing.notes(root)))


def _load(place):
    return tf.io.read_file(place), tf.constant(headers.OK)


def _loader(rules):
    """Returns the function that also loads what Pillow has to read."""

    def read(path):
        content, code = converted.read(path, rules)
        return content, np.int32(code)

    def convert(place):
        content, code = tf.numpy_function(
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
