"""Lists the images of a folder, and counts its other files by kind."""

import os
import posixpath
from collections import Counter
from typing import FrozenSet, List, NamedTuple, Optional

import tensorflow as tf

from clsa_tf.data import converted, headers

# Files that TensorFlow decodes.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
# Common files that are never usable images, so they are not opened. Raw files
# would be recognised as the small TIFF image at their beginning.
_OTHERS = frozenset(
    ".txt .csv .tsv .json .jsonl .xml .yaml .yml .md .html .htm .log .pdf .npy "
    ".npz .mat .h5 .pkl .parquet .tfrecord .zip .tar .gz .tgz .7z .rar .mp4 "
    ".mov .avi .mkv .webm .m4v .3gp .mp3 .wav .m4a .psd .svg .xmp .aae .thm "
    ".dng .nef .cr2 .cr3 .arw .orf .rw2 .raf .py .sh .js .css .ini .db".split()
)
# Possible lengths of a BMP header.
_BMP_HEADERS = [bytes([n, 0, 0, 0]) for n in (12, 40, 52, 56, 64, 108, 124)]
_LONGEST = 10  # characters; a longer suffix does not count as an extension
_NAMED = 8  # kinds of files that a sentence lists
# Kinds of left-out entries that are not suffixes of files.
_CLOSED = "folders that cannot be opened"
_NOT_FILES = "that are not files (pipes, sockets, devices)"
_SINGULAR = {
    _CLOSED: "folder that cannot be opened",
    _NOT_FILES: "that is not a file (a pipe, socket or device)",
}


class Listing(NamedTuple):
    """The files anywhere below a folder.

    Attributes:
        images: sorted paths below the root, with "/".
        converted: the images that the module `converted` has to read.
        left_out: kind -> number of files that are not images.
        recognised: suffix -> number of images recognised only by content.
    """

    images: List[str]
    converted: FrozenSet[str]
    left_out: Counter
    recognised: Counter

    def notes(self, root: str) -> List[str]:
        """Returns sentences about the listing of `root` for the user."""
        notes = []
        if self.left_out:
            notes.append(f"left out of {root}: {self.describe()}")
        if self.recognised:
            notes.append(
                f"recognised as images by content in {root}: "
                f"{self.describe(self.recognised)}"
            )
        return notes

    def describe(self, kinds: Optional[Counter] = None) -> str:
        """Counts files by kind: "3 files: 2 .txt, 1 .mp4"; "" for none.

        Args:
            kinds: kind -> number of files; None for the files left out.
        """
        kinds = self.left_out if kinds is None else kinds
        if not kinds:
            return ""
        most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
        named = [
            f"{count:,} {_SINGULAR.get(kind, kind) if count == 1 else kind}"
            for kind, count in most[:_NAMED]
        ]
        rest = sum(count for _, count in most[_NAMED:])
        named += [f"{rest:,} of other kinds"] if rest else []
        total = sum(kinds.values())
        noun = "file" if total == 1 else "files"
        return f"{total:,} {noun}: {', '.join(named)}"


def list_images(root: str, *, more_formats: bool = True) -> Listing:
    """Lists the images anywhere below a folder.

    Hidden files and folders are skipped, and links are followed. In local
    folders, anything that is not a regular file is left out without being
    opened, and files with an unknown suffix are recognised by content.

    Args:
        root: a local path or a URL that `tf.io.gfile` supports.
        more_formats: see `headers.Rules`. If False, only files with a suffix
            in `SUFFIXES` are images.

    Returns:
        A `Listing`.
    """
    images, to_convert = [], set()
    left_out, recognised = Counter(), Counter()
    remote = "://" in root
    for path, reason in _walk_remote(root) if remote else _walk(root):
        if path.startswith(".") or "/." in path:
            continue
        if reason:
            left_out[reason] += 1
            continue
        suffix = _suffix(path)
        if suffix in SUFFIXES:
            images.append(path)
            continue
        kind = converted.SUFFIXES.get(suffix, "") if more_formats else ""
        by_content = more_formats and not (kind or remote or suffix in _OTHERS)
        if by_content:
            kind = _look(posixpath.join(root, path), suffix)
        missing = kind in headers.CONVERTED and converted.missing(kind)
        shown = suffix or "without extension"
        if not kind:
            left_out[shown if suffix else f"{shown} that are not images"] += 1
        elif missing:
            left_out[f"{shown} ({kind}: {missing})"] += 1
        else:
            images.append(path)
            recognised[shown] += by_content
            if kind in headers.CONVERTED:
                to_convert.add(path)
    return Listing(sorted(images), frozenset(to_convert), left_out, +recognised)


def _suffix(path):
    """Returns the extension of a path, in lower case; "" for none."""
    suffix = os.path.splitext(path)[1].lower()
    strange = len(suffix) > _LONGEST or not suffix.isprintable()
    return "" if strange or " " in suffix or suffix == "." else suffix


def _look(path, suffix):
    """Returns the kind of a file by content, see `headers.kind`; "" if none."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(headers.HEAD)
    except OSError:
        return ""
    kind = headers.kind(head)
    # Raw files begin like TIFF files, but that image is only a thumbnail.
    if kind == "TIFF" and suffix:
        return ""
    # A text may also begin with BM, so the header length is checked, too.
    if kind == "BMP" and head[14:18] not in _BMP_HEADERS:
        return ""
    return kind


def _walk_remote(root):
    """Yields (path below root, "") for each file."""
    for folder, _, files in tf.io.gfile.walk(root):
        below = folder[len(root) :].strip("/")
        for name in files:
            yield posixpath.join(below, name), ""


def _walk(root):
    """Yields (path below root, reason to leave it out or "") of each file.

    Most files need no system call of their own. File names may be any bytes.
    """
    visited, waiting = set(), [""]
    while waiting:
        below = waiting.pop()
        visited.add(os.path.realpath(os.path.join(root, below)))
        try:
            with os.scandir(os.path.join(root, below)) as scan:
                entries = list(scan)
        except OSError:
            yield below, _CLOSED
            continue
        folders = []
        for entry in entries:
            path = posixpath.join(below, entry.name)
            if _is(entry.is_dir):
                # Links to a parent folder would never end.
                hidden = entry.name.startswith(".")
                if not hidden and os.path.realpath(entry.path) not in visited:
                    folders.append(path)
            elif _is(entry.is_file) or not os.path.exists(entry.path):
                yield path, ""  # a dangling link counts as unreadable later
            else:
                yield path, _NOT_FILES
        waiting += reversed(folders)


def _is(question):
    try:
        return question()  # follows links
    except OSError:  # for example a link to itself
        return False
