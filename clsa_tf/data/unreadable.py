"""Counts and lists unreadable images; too many of them are an error."""

import itertools
import os
import sys
import threading
from typing import Mapping, Optional

import tensorflow as tf

from clsa_tf import files
from clsa_tf.data import headers
from clsa_tf.data.graph_calls import in_python
from clsa_tf.data.source import Source
from clsa_tf.errors import UserError
from clsa_tf.terminal import progress

# One line per image: its name, a tab, the reason. Earlier versions wrote the
# name only.
FILE = "unreadable.txt"
LOGGED = 10  # images that are logged one by one
NAMED = 3  # images in the error message


class UnreadableImages:
    """Collects the unreadable images of a run. Thread-safe.

    A run may continue while, in each source, at most a share of
    `max_bad_share` of the distinct images seen so far is unreadable. At least
    1,000 images (or all, if the source has fewer) count as seen, so that a few
    unreadable images at the beginning do not stop the run.
    """

    def __init__(
        self, *, max_bad_share: float, advice: str = "", remote: bool = False
    ):
        """Starts without any unreadable images.

        Args:
            max_bad_share: tolerated share of unreadable images, in [0, 1].
            advice: further advice for the error message, in the imperative.
            remote: whether other hosts read the images. They cannot call this
                process, so they replace unreadable images without a report.
        """
        self._remote = remote
        self._max_bad_share = max_bad_share
        self._advice = f"{advice}, " if advice else ""
        self._lock = threading.Lock()
        self._names = {}  # source -> {name: reason}, in order of arrival
        self._error = None
        self._path = None
        self._noted = set()  # names in that file
        self._logged = 0

    def record(self, directory: str, moved=()):
        """Appends names to `FILE` from now on, and reads the names in it.

        The names read count in `count`, but not in the share, because the
        number of images seen with them is unknown.

        Args:
            directory: directory of the run; it must exist.
            moved: pairs (before, now) of datasets that have moved, as flags
                spell them. Names of images in them are changed accordingly.
        """
        self._path = os.path.join(directory, FILE)
        if not os.path.exists(self._path):
            return
        with open(self._path, encoding="utf-8", errors="replace") as file:
            before = file.read().splitlines()
        lines = [_follow(line, moved) for line in before]
        if lines != before:
            text = "".join(f"{line}\n" for line in dict.fromkeys(lines))
            files.write_atomically(self._path, text)
        self._noted.update(line.split("\t")[0] for line in lines)

    @property
    def count(self) -> int:
        """Number of distinct unreadable images so far."""
        return len(self._noted)

    def summary(self) -> str:
        """Returns a sentence to print at the end of the run."""
        where = f"; {self._path} names them" if self._path else ""
        what = "images were" if self.count != 1 else "image was"
        return f"{self.count} unreadable {what} left out{where}."

    def error(self) -> Optional[UserError]:
        """Returns the error that stopped the data, or None."""
        return self._error

    def report(
        self,
        names: Mapping[str, str],
        *,
        source: Source,
        seen: int,
        lost: bool = False,
    ) -> bool:
        """Adds unreadable images.

        Args:
            names: name -> reason, a clause that follows "which". Repeated
                names do not count.
            source: the source of the images.
            seen: number of examples read from it so far, including unreadable
                ones.
            lost: whether a batch has no readable image at all.

        Returns:
            Whether the run may continue. It may not if there are too many
            unreadable images, if `lost`, or if names cannot be written. Then
            `error()` returns the reason.
        """
        with self._lock:
            known = self._names.setdefault(source, {})
            for name, reason in names.items():
                if name not in known:
                    known[name] = reason
                    self._note(name, reason)
            counted = min(source.size, max(seen, 1000))
            if lost or len(known) > self._max_bad_share * counted:
                error = self._too_many(known, source, seen, lost)
                self._error = self._error or error
            return self._error is None

    def report_op(
        self, names, codes, *, source: Source, seen, lost
    ) -> tf.Operation:
        """Calls `report` from inside a graph.

        Args:
            names: string[n].
            codes: i32[n], codes of `headers`.
            source: see `report`.
            seen: i64[], see `report`.
            lost: bool[], see `report`.

        Returns:
            An operation. It fails with `tf.errors.InvalidArgumentError` if the
            run may not continue.
        """
        if self._remote:
            return tf.debugging.Assert(
                ~lost, ["No image of a batch can be read."]
            )

        words = headers.reasons(source.rules)

        def report(names, codes, seen, lost):
            named = {
                name.decode("utf-8", "replace"): words[code]
                for name, code in zip(names, codes)
            }
            return self.report(
                named, source=source, seen=int(seen), lost=bool(lost)
            )

        # An exception raised in the Python function would be logged repeatedly,
        # with tracebacks. So it returns a boolean.
        fine = in_python(
            report, [names, codes, seen, lost], tf.bool, stateful=True
        )
        return tf.debugging.Assert(fine, ["Too many unreadable images."])

    def _note(self, name, reason):
        name = " ".join(name.replace("\t", " ").splitlines())
        if name in self._noted:
            return
        self._noted.add(name)
        self._logged += 1
        if self._logged <= LOGGED:
            _print(f"Cannot read the image {name}, which {reason}; skipped.")
        if self._logged == LOGGED:
            _print("Further unreadable images are only counted.")
        if self._path:
            self._write(f"{name}\t{reason}")

    def _write(self, line):
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as e:
            self._error = self._error or UserError(
                f"Cannot write the names of unreadable images to {self._path}: "
                f"{e.strerror}; make room or fix the permissions, then start "
                "the same command again."
            )

    def _too_many(self, known, source, seen, lost):
        seen = min(seen, source.size)
        received = (
            "a whole batch of such images"
            if lost
            else f"{len(known)} among {seen} ({len(known) / seen:.1%})"
        )
        named = [
            f"{name}, which {reason}"
            for name, reason in itertools.islice(known.items(), NAMED)
        ]
        raising = "--max_bad_share"
        limits = headers.reasons(source.rules)
        if limits[headers.BYTES] in known.values():
            raising += ", or --max_image_bytes"
        if limits[headers.PIXELS] in known.values():
            raising += ", or --max_image_pixels"
        return UserError(
            f"Expected at most {self._max_bad_share:.1%} unreadable images in "
            f"{source.name}, received {received}, such as "
            f"{', '.join(named)}; {self._advice}repair or remove them, or "
            f"raise {raising}."
        )


def _print(text):
    progress.write(text, file=sys.stderr)


def _follow(line, moved):
    """Returns a line of `FILE` with the new path if its dataset has moved."""
    for before, now in moved:
        # Names are paths, so "folder:" is removed from folder:/photos.
        before, now = (text.partition(":")[2] or text for text in (before, now))
        root = os.path.join(before, "")
        if line.startswith(root):
            return os.path.join(now, "") + line[len(root) :]
    return line
