"""Recognises the images of a run at another path, by a digest.

The digest covers names and sizes, and a few contents. It is cheap enough for
every start, and two datasets do not share one by chance. It does not depend on
the location of the images. It may miss a few files that were changed in place.
"""

import hashlib
import os
import posixpath
import stat
from typing import Iterable, List, Sequence, Tuple

import numpy as np
import tensorflow as tf

# Number of files whose sizes count, spread evenly over the list.
SIZES = 1000
# Number of files whose first CONTENT_BYTES count, spread evenly as well.
CONTENTS = 16
CONTENT_BYTES = 2**16


def of_files(root: str, paths: Sequence[str]) -> str:
    """Returns the digest of a folder of images.

    Args:
        root: the folder, a local path or a URL. With a URL, where each file
            costs a request, only `CONTENTS` sizes and contents count.
        paths: paths of the images below root, in the order of the source.
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
        parts: (path of the file, records before the part, records in the part
            or -1 for all), in the order of the source.
        about: other properties that identify the examples.
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
    """Returns the size of a file in bytes; -1 if it cannot be read."""
    try:
        if "://" in path:
            return tf.io.gfile.stat(path).length
        return os.stat(path).st_size
    except (OSError, tf.errors.OpError):
        return -1


def _start(path) -> bytes:
    """Returns the first bytes of a file; empty if it cannot be read."""
    try:
        if "://" in path:
            with tf.io.gfile.GFile(path, "rb") as file:
                return file.read(CONTENT_BYTES)
        # Opening a FIFO would wait forever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b""
        with open(path, "rb") as file:
            return file.read(CONTENT_BYTES)
    except (OSError, tf.errors.OpError):
        return b""
