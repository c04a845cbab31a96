"""Which images a model refuses, and that the others are not lost for it."""

import contextlib
import os
import re
import stat
import threading

import numpy as np

from clsa_tf.errors import UserError

# More than any photograph, and what a message of gRPC can hold many times.
_LARGEST = 2**28  # bytes

_ADVICE = {
    "INVALID_ARGUMENT": "check what was sent",
    "NOT_FOUND": "check the model's name, its version and label",
    "FAILED_PRECONDITION": "check the signature's name",
    "UNAVAILABLE": "check the address and that the server runs",
    "RESOURCE_EXHAUSTED": "try again later, or ask for less at once",
    "DEADLINE_EXCEEDED": "raise --timeout or lower --batch_size",
}
# What our exports say, see `export.model.served`.
_OURS = re.compile(r"image 0 \(counted from 0\), which (.+?); leave it out")
_TRANSIENT = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")


class ModelError(UserError):
    """A model, or the server that it is asked of, gave no embeddings.

    Args:
        place: the model's directory or the server's address.
        status: name of a gRPC status code.
        reason: what was said, one line.
        shown: the status as it came, if that was another.
        advice: what to do; None: what usually helps.

    Attributes:
        status: as above.
        reason: the status and what was said.
    """

    def __init__(self, place, status, reason, *, shown=None, advice=None):
        """See the class."""
        self.status = status
        self.reason = f"{shown or status}: {reason}"
        advice = advice or _ADVICE.get(status, "look at the server's log")
        super().__init__(
            f"Expected an answer from {place}, received {self.reason}; "
            f"{advice}."
        )

    @property
    def transient(self):
        """Whether the same call may work a little later."""
        return self.status in _TRANSIENT

    @property
    def refused(self):
        """Whether it was the fault of what was sent."""
        return self.status == "INVALID_ARGUMENT"


def read_image(path):
    """Reads a file, for `embed_each`.

    Args:
        path: of a local file.

    Returns:
        bytes, or the `OSError` that says why not.
    """
    try:
        # A pipe would be waited for, a film would not fit.
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return OSError("not a regular file")
        if found.st_size > _LARGEST:
            return OSError(f"{found.st_size} bytes, more than {_LARGEST}")
        with open(path, "rb") as file:
            return file.read()
    except OSError as e:
        return e


class Gate:
    """Lets some through together, or one alone.

    Args:
        most: how many may be in it together.
    """

    def __init__(self, most):
        """See the class."""
        self._most = most
        self._places = threading.Semaphore(most)
        self._next = threading.Lock()

    def together(self):
        """A context manager: inside, others may be, too."""
        return self._places

    @contextlib.contextmanager
    def alone(self):
        """A context manager: inside, nobody else is."""
        with self._next, contextlib.ExitStack() as stack:
            for _ in range(self._most):
                stack.enter_context(self._places)
            yield


def embed_each(embed, contents, gate=None):
    """Embeds images, of which some may be bad.

    A batch that is refused is halved until what is refused is one image.

    Args:
        embed: function from a list of N >= 1 `bytes` to a dictionary of arrays
            `[N, …]`; raises `ModelError`. Rows that its output `valid`, if it
            has one, says are bad are left out, and so is `valid`.
        contents: list of `bytes`, or `OSError` for what could not be read.
        gate: `Gate` of the threads that ask the same server. One that joins
            requests to batches, as TensorFlow Serving does, refuses good
            images that came together with a bad one of another thread. So
            who is to blame is found out alone.

    Returns:
        (dictionary of arrays `[G, …]` for the G good ones, empty if G = 0;
        dictionary from the places of the bad ones in `contents` to reasons).

    Raises:
        ModelError: for other reasons than bad images.
    """
    gate = gate or Gate(1)
    bad = {
        i: content.strerror or str(content)
        for i, content in enumerate(contents)
        if isinstance(content, OSError)
    }
    rows = [i for i in range(len(contents)) if i not in bad]
    try:
        with gate.together():
            found = [_good(embed, contents, rows, bad)] if rows else []
    except ModelError as e:
        if not e.refused:
            raise
        with gate.alone():
            found = _halves(embed, contents, rows, bad)
    names = found[0] if found else ()
    outputs = {name: np.concatenate([f[name] for f in found]) for name in names}
    return outputs, dict(sorted(bad.items()))


def _halves(embed, contents, rows, bad):
    """Outputs for `rows`, in pieces; adds what is refused to `bad`."""
    try:
        return [_good(embed, contents, rows, bad)]
    except ModelError as e:
        if not e.refused:
            raise
        if len(rows) == 1:
            bad[rows[0]] = _in_short(e.reason)
            return []
    middle = len(rows) // 2
    first = _halves(embed, contents, rows[:middle], bad)
    return first + _halves(embed, contents, rows[middle:], bad)


def _in_short(reason):
    """What is wrong with the only image of a request, of what a model says."""
    match = _OURS.search(reason)
    return match[1] if match else reason


def _good(embed, contents, rows, bad):
    """Outputs for those of `rows` that are valid; adds the others to `bad`."""
    outputs = embed([contents[i] for i in rows])
    if "valid" not in outputs:
        return outputs
    valid = outputs["valid"]
    for row in np.flatnonzero(~valid):
        bad[rows[row]] = "the model says that it is not valid"
    return {k: x[valid] for k, x in outputs.items() if k != "valid"}
