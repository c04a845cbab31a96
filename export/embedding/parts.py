"""What of a long piece of work is done: parts that survive a kill."""

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
    """Embeddings of a list of images, as far as they are there.

    Part after part, in the order of the images; each is a file that is there
    whole or not at all. The directory is this process's until `close`, or
    until it ends, however it ends.

    Args:
        directory: theirs; created when missing.
        manifest: what they are of: dictionary from words, for messages, to
            what JSON can hold. The same as when they were begun.
        widths: from the names of the embeddings to their widths.

    Attributes:
        directory: as above.
        done: how many images they are of, bad ones included.

    Raises:
        UserError: they are of something else, or another process is at it.
    """

    def __init__(self, directory, manifest, widths):
        """See the class."""
        self.directory = directory
        os.makedirs(directory, exist_ok=True)
        self._lock_file = _lock(directory)
        _check_manifest(os.path.join(directory, _MANIFEST), manifest)
        self._widths = widths
        self._batches = []  # since the last part: (start, stop, outputs, bad)
        self._paths = []
        self.done = 0
        for name in sorted(os.listdir(directory)):
            self._take_over(name)

    def add(self, start, stop, outputs, bad):
        """Adds the next batch, which `save` makes last.

        Args:
            start: number of its first image.
            stop: number of the first behind it.
            outputs: of the good ones, in order: dictionary of float32
                `[G, width]`; empty if G = 0.
            bad: dictionary from the others, counted from `start`, to reasons.
        """
        self._batches.append((start, stop, outputs, bad))

    def save(self):
        """Makes a part of what was added since the last one."""
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
        outputs = {f"output/{k}": self._joined(k) for k in self._widths}
        # Not into the file: without room there, zipfile would complain twice.
        content = io.BytesIO()
        np.savez(
            content,
            rows=np.array(rows, np.int64),
            bad=np.array(list(bad), np.int64),
            reasons=np.array(list(bad.values()), np.str_),
            **outputs,
        )
        with open(path + ".draft", "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".draft", path)
        self._paths.append(path)
        self._batches = []
        self.done = stop

    def _joined(self, name):
        empty = np.zeros([0, self._widths[name]], np.float32)
        blocks = [
            outputs[name] for _, _, outputs, _ in self._batches if outputs
        ]
        return np.concatenate([empty, *blocks])

    def rows(self):
        """Which images there are embeddings of, a list of ints."""
        found = [_load(path, "rows") for path in self._paths]
        return [int(row) for rows in found for row in rows]

    def bad(self):
        """Dictionary from images without embeddings to the reasons."""
        found = {}
        for path in self._paths:
            rows, reasons = _load(path, "bad"), _load(path, "reasons")
            found |= zip(map(int, rows), map(str, reasons))
        return found

    def blocks(self, names):
        """Yields the outputs `names`, part by part, for `embeddings.write`."""
        for path in self._paths:
            if len(_load(path, "rows")):
                yield {name: _load(path, f"output/{name}") for name in names}

    def remove(self):
        """Removes them all."""
        shutil.rmtree(self.directory)

    def close(self):
        """Gives the directory back."""
        self._lock_file.close()

    def _take_over(self, name):
        """Goes on behind a part, or removes what cannot be gone on from."""
        path = os.path.join(self.directory, name)
        match = _NAME.fullmatch(name)
        if not match:
            if name not in (_MANIFEST, _LOCK):
                os.remove(path)  # a draft
            return
        start, stop = map(int, match.groups())
        if start == self.done and _is_whole(path):
            self._paths.append(path)
            self.done = stop
        else:
            os.remove(path)


def _load(path, name):
    with np.load(path, allow_pickle=False) as data:
        return data[name]


def _is_whole(path):
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
            before = dict(json.load(file))
    except (ValueError, TypeError) as e:
        raise UserError(
            f"Expected a description of the parts in {path}, received "
            f"something else; remove {directory} or choose another --output."
        ) from e
    for word in sorted({*before, *manifest}):
        if before.get(word) != manifest.get(word):
            raise UserError(
                f"Expected to go on with the {word} that {directory} was begun "
                f"with, {before.get(word)}, received {manifest.get(word)}; "
                "remove that directory or choose another --output."
            )


def _lock(directory):
    try:
        return files.lock(os.path.join(directory, _LOCK))
    except files.Locked as e:
        raise UserError(
            f"Expected an --output that no other process writes, received one "
            f"in use by {e}; wait for it or choose another."
        ) from e
