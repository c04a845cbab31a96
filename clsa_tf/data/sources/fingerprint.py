"""Telling whether images at another path are those that a run began with.

A digest of names and sizes, and of a few contents: cheap enough for every
start, and not the same for two datasets by chance. It says nothing about where
the images are. It does not notice a few files that were changed in place.
"""

import hashlib
import os
import posixpath
import stat
from typing import Iterable, List, Sequence, Tuple

import numpy as np
import tensorflow as tf

# Of so many files, spread evenly over the list, the size counts, too.
SIZES = 1000
# Likewise the first bytes.
CONTENTS = 16
CONTENT_BYTES = 2**16


def of_files(root: str, paths: Sequence[str]) -> str:
    """Returns the digest of a folder of images.

    Args:
        root: the folder, a local path or a URL. Of files behind a URL, where
            each costs a request, only `CONTENTS` sizes and contents count.
        paths: of the images below it, in the order of the source.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path) + b"\0")
    remote = "://" in root
    for path in _spread(paths, CONTENTS if remote else SIZES):
        digest.update(f"{_size(posixpath.join(root, path))}\0".encode())
    for path in _spread(paths, CONTENTS):
        digest.update(_start(posixpath.join(root, path)) + b"\0")
    return f"sha256:{digest.hexdigest()}"


def of_records(parts: Iterable[Tuple[str, int, int]], about: str) -> str:
    """Returns the digest of record files.

    Args:
        parts: (path of the file, records left out before the part, records in
            it or -1 for all), in the order of the source.
        about: what else makes these examples what they are.
    """
    digest = hashlib.sha256(about.encode())
    for path, skip, take in parts:
        name = posixpath.basename(path)
        digest.update(f"\0{name}\0{_size(path)}\0{skip}\0{take}".encode())
    return f"sha256:{digest.hexdigest()}"


def _spread(paths, count) -> List[str]:
    rows = np.linspace(0, len(paths) - 1, min(count, len(paths)))
    return [paths[row] for row in rows.astype(int)]


def _size(path) -> int:
    """Bytes of a file; -1 if there is none any more."""
    try:
        if "://" in path:
            return tf.io.gfile.stat(path).length
        return os.stat(path).st_size
    except (OSError, tf.errors.OpError):
        return -1


def _start(path) -> bytes:
    """First bytes of a file; none if it cannot be read."""
    try:
        if "://" in path:
            with tf.io.gfile.GFile(path, "rb") as file:
                return file.read(CONTENT_BYTES)
        # Opening a FIFO would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b""
        with open(path, "rb") as file:
            return file.read(CONTENT_BYTES)
    except (OSError, tf.errors.OpError):
        return b""
