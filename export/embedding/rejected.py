"""Isolate rejected images within a batch, and embed the others."""

import contextlib
import os
import re
import stat
import threading

import numpy as np

from clsa_tf.errors import UserError

# Larger than any photograph, and far below the limit of a gRPC message.
_MAX_BYTES = 2**28

_ADVICE = {
    "INVALID_ARGUMENT": "check the request",
    "NOT_FOUND": "check the model's name, its version and label",
    "FAILED_PRECONDITION": "check the signature's name",
    "UNAVAILABLE": "check the address and that the server is running",
    "RESOURCE_EXHAUSTED": "try again later, or send smaller requests",
    "DEADLINE_EXCEEDED": "raise --timeout or lower --batch_size",
}
# The error message of exported models, see `export.model.served`.
_BAD_IMAGE = re.compile(
    r"image 0 \(counted from 0\), which (.+?); leave it out"
)
_TRANSIENT = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")


class ModelError(UserError):
    """A model or its server failed to return embeddings.

    Args:
        place: the model's directory or the server's address.
        status: name of a gRPC status code.
        reason: the server's error message, one line.
        shown: status for the message, such as `"HTTP 404"`; None: `status`.
        advice: what the user should do; None: the default for the status.

    Attributes:
        status: see above.
        reason: shown status and error message.
    """

    def __init__(self, place, status, reason, *, shown=None, advice=None):
        """See the class."""
        self.status = status
        self.reason = f"{shown or status}: {reason}"
        advice = advice or _ADVICE.get(status, "look at the server's log")
        super().__init__(
            f"Request to {place} failed with {self.reason}; {advice}."
        )

    @property
    def transient(self):
        """Whether the same call may succeed later."""
        return self.status in _TRANSIENT

    @property
    def rejected(self):
        """Whether the model rejected the content of the request."""
        return self.status == "INVALID_ARGUMENT"


def read_image(path):
    """Reads a file, for `embed_each`.

    Args:
        path: path of a local file.

    Returns:
        bytes, or the `OSError` with the reason for the failure.
    """
    try:
        # Reading a pipe would block; a video may not fit in memory.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return OSError("not a regular file")
        if status.st_size > _MAX_BYTES:
            return OSError(
                f"the file has {status.st_size} bytes, more than {_MAX_BYTES}"
            )
        with open(path, "rb") as file:
            return file.read()
    except OSError as e:
        return e


class Gate:
    """A lock with a shared and an exclusive mode.

    Args:
        limit: number of threads that may hold it in shared mode.
    """

    def __init__(self, limit):
        """See the class."""
        self._limit = limit
        self._slots = threading.Semaphore(limit)
        self._exclusive = threading.Lock()

    def shared(self):
        """Returns a context manager for the shared mode."""
        return self._slots

    @contextlib.contextmanager
    def exclusive(self):
        """Returns a context manager for the exclusive mode."""
        with self._exclusive, contextlib.ExitStack() as stack:
            for _ in range(self._limit):
                stack.enter_context(self._slots)
            yield


def embed_each(embed, contents, gate=None):
    """Embeds images, some of which may be bad.

    A rejected batch is bisected until each rejected image is alone.

    Args:
        embed: function from a list of N >= 1 `bytes` to a dictionary of arrays
            `[N, …]`; raises `ModelError`. If it has the output `valid`, bool
            `[N]`, the result leaves out the rows that are not valid, and
            `valid` itself.
        contents: list of `bytes`, or `OSError` for a file that could not be
            read.
        gate: `Gate` of all threads that send requests to the same server. A
            server with batching, such as TensorFlow Serving, rejects the good
            images of one thread together with a bad image of another. The
            bisection is therefore exclusive.

    Returns:
        (dictionary of arrays `[G, …]` for the G good images, empty if G = 0;
        dictionary from the positions of the bad images in `contents` to
        reasons).

    Raises:
        ModelError: the model failed for another reason than a bad image.
    """
    gate = gate or Gate(1)
    bad = {
        i: content.strerror or str(content)
        for i, content in enumerate(contents)
        if isinstance(content, OSError)
    }
    rows = [i for i in range(len(contents)) if i not in bad]
    try:
        with gate.shared():
            pieces = [_embed_valid(embed, contents, rows, bad)] if rows else []
    except ModelError as e:
        if not e.rejected:
            raise
        with gate.exclusive():
            pieces = _bisect(embed, contents, rows, bad)
    names = pieces[0] if pieces else ()
    outputs = {
        name: np.concatenate([piece[name] for piece in pieces])
        for name in names
    }
    return outputs, dict(sorted(bad.items()))


def _bisect(embed, contents, rows, bad):
    """Returns outputs for `rows`, in pieces; adds rejected images to `bad`."""
    try:
        return [_embed_valid(embed, contents, rows, bad)]
    except ModelError as e:
        if not e.rejected:
            raise
        if len(rows) == 1:
            bad[rows[0]] = _image_reason(e.reason)
            return []
    middle = len(rows) // 2
    first = _bisect(embed, contents, rows[:middle], bad)
    return first + _bisect(embed, contents, rows[middle:], bad)


def _image_reason(reason):
    """Shortens the error message of a request with a single image."""
    match = _BAD_IMAGE.search(reason)
    return match[1] if match else reason


def _embed_valid(embed, contents, rows, bad):
    """Returns outputs for the valid `rows`; adds the other rows to `bad`."""
    outputs = embed([contents[i] for i in rows])
    if "valid" not in outputs:
        return outputs
    valid = outputs["valid"]
    for row in np.flatnonzero(~valid):
        bad[rows[row]] = "the model marked it as not valid"
    return {k: x[valid] for k, x in outputs.items() if k != "valid"}
