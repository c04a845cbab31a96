"""Embeddings on disk in parts, which survive a crash of the process."""

import io
import json
import os
import re
import shutil
import zipfile

import numpy as np

from clsa_tf import files
from clsa_tf.errors import UserError

_MANIFEST = "manifest.json"
_LOCK = "lock"
_NAME = re.compile(r"part-(\d{12})-(\d{12})\.npz")


class Parts:
    """The embeddings of the first images of a list.

    Each part is a file that is complete or missing. The parts follow the order
    of the images. This process locks the directory until `close` or until it
    ends.

    Args:
        directory: directory of the parts; created if missing.
        manifest: settings on which the embeddings depend, a dictionary from
            their names to JSON values. It has to equal the stored one.
        widths: dictionary from the names of the embeddings to their widths.

    Attributes:
        directory: see above.
        done: number of images in the parts, bad ones included.

    Raises:
        UserError: the stored manifest differs, or another process has the
            lock.
    """

    def __init__(self, directory, manifest, widths):
        """See the class."""
        self.directory = directory
        os.makedirs(directory, exist_ok=True)
        self._lock_file = _lock(directory)
        _check_manifest(os.path.join(directory, _MANIFEST), manifest)
        self._widths = widths
        self._batches = []  # not saved yet: (start, stop, outputs, bad)
        self._paths = []
        self.done = 0
        for name in sorted(os.listdir(directory)):
            self._resume(name)

    def add(self, start, stop, outputs, bad):
        """Adds the next batch; `save` writes it to disk.

        Args:
            start: number of its first image.
            stop: number of its last image plus 1.
            outputs: outputs of the G good images, in order: dictionary of
                float32 `[G, width]`; empty if G = 0.
            bad: dictionary from the bad images, counted from `start`, to
                reasons.
        """
        self._batches.append((start, stop, outputs, bad))

    def save(self):
        """Writes the batches that are not saved yet as one part."""
        if not self._batches:
            return
        rows, bad = [], {}
        for start, stop, _, reasons in self._batches:
            rows += [i for i in range(start, stop) if i - start not in reasons]
            bad |= {start + i: reason for i, reason in reasons.items()}
        stop = self._batches[-1][1]
        path = os.path.join(
            self.directory, f"part-{self.done:012d}-{stop:012d}.npz"
        )
        outputs = {f"output/{k}": self._concatenate(k) for k in self._widths}
        # In memory first: on a full disk zipfile would fail a second time when
        # it closes the file.
        content = io.BytesIO()
        np.savez(
            content,
            rows=np.array(rows, np.int64),
            bad=np.array(list(bad), np.int64),
            reasons=np.array(list(bad.values()), np.str_),
            **outputs,
        )
        with files.replacing(path) as draft, open(draft, "wb") as file:
            file.write(content.getbuffer())
        self._paths.append(path)
        self._batches = []
        self.done = stop

    def _concatenate(self, name):
        empty = np.zeros([0, self._widths[name]], np.float32)
        blocks = [
            outputs[name] for _, _, outputs, _ in self._batches if outputs
        ]
        return np.concatenate([empty, *blocks])

    def rows(self):
        """Returns the numbers of the images with embeddings, a list of ints."""
        parts = [_load(path, "rows") for path in self._paths]
        return [int(row) for rows in parts for row in rows]

    def bad(self):
        """Returns the reasons by number of the images without embeddings."""
        bad = {}
        for path in self._paths:
            rows, reasons = _load(path, "bad"), _load(path, "reasons")
            bad |= zip(map(int, rows), map(str, reasons))
        return bad

    def blocks(self, names):
        """Yields the outputs `names` of each part, for `embeddings.write`."""
        for path in self._paths:
            if len(_load(path, "rows")):
                yield {name: _load(path, f"output/{name}") for name in names}

    def remove(self):
        """Removes the directory with all parts."""
        shutil.rmtree(self.directory)

    def close(self):
        """Releases the lock of the directory."""
        self._lock_file.close()

    def _resume(self, name):
        """Continues after a part; removes it if it cannot be used."""
        path = os.path.join(self.directory, name)
        match = _NAME.fullmatch(name)
        if not match:
            if name not in (_MANIFEST, _LOCK):
                os.remove(path)  # a draft
            return
        start, stop = map(int, match.groups())
        if start == self.done and _is_complete(path):
            self._paths.append(path)
            self.done = stop
        else:
            os.remove(path)


def _load(path, name):
    with np.load(path, allow_pickle=False) as data:
        return data[name]


def _is_complete(path):
    try:
        _load(path, "rows")
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        return False
    return True


def _check_manifest(path, manifest):
    directory = os.path.dirname(path)
    if not os.path.exists(path):
        files.write_atomically(path, json.dumps(manifest, indent=2) + "\n")
        return
    try:
        with open(path, encoding="utf-8") as file:
            stored = dict(json.load(file))
    except (ValueError, TypeError) as e:
        raise UserError(
            f"Cannot read {path}, the settings of the parts: {e}; remove "
            f"{directory} or choose another --output."
        ) from e
    for key in sorted({*stored, *manifest}):
        if stored.get(key) != manifest.get(key):
            raise UserError(
                f"Expected {key} {stored.get(key, False)}, as for the parts in "
                f"{directory}, received {manifest.get(key, False)}; remove the "
                "directory or choose another --output."
            )


def _lock(directory):
    try:
        return files.lock(os.path.join(directory, _LOCK))
    except files.Locked as e:
        raise UserError(
            f"Expected an --output that no other process is writing, received "
            f"{directory}, locked by {e}; wait for it or choose another "
            "--output."
        ) from e
