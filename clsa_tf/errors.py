"""Exceptions whose cause is outside the program."""

import errno
import os
import re
import signal
from typing import Optional

# Errors of the operating system for a full or unusable disk.
_OF_DISKS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ESTALE,
)


class UserError(Exception):
    """Invalid input: a flag, a file, an image, a checkpoint.

    The message has the form "Expected X, received Y; do Z." where X is a value.
    Otherwise it names the failure, its cause and a remedy. Entry points print
    it without a traceback and exit with status 1.
    """


class Stopped(BaseException):
    """A signal asked the run to stop.

    Entry points exit with status 128 + signal, as shells do. Like
    KeyboardInterrupt it is not an `Exception`, so libraries that catch or wrap
    every `Exception` let it pass.

    Attributes:
        signal: number of the signal.
        saved: whether all progress of the run is saved; None if there is
            nothing to save.
    """

    def __init__(self, number, *, saved: Optional[bool] = True):
        """See the class."""
        super().__init__(signal.Signals(number).name)
        self.signal = number
        self.saved = saved


class WorkerLost(Exception):
    """Another process of the same job has stopped; the job cannot continue.

    Entry points exit with status 138. Kubernetes' training operator restarts
    jobs that exit with this status or a higher one.
    """

    STATUS = 138


def is_of_disk(error):
    """Whether the cause of an exception is a full or unusable disk.

    TensorFlow and HDF5 quote the operating system's text in their messages.
    """
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and number is not None:
        return number in _OF_DISKS
    return any(os.strerror(x) in str(error) for x in _OF_DISKS)


def first_line(error):
    """An error's message in one line, without TensorFlow's node names."""
    text = getattr(error, "message", None) or str(error)
    # TensorFlow prints the cause below the graph location.
    where = ("Graph execution error", "Detected at node", "<stack", " ")
    lines = [line for line in text.split("\n") if line.strip()]
    causes = [
        re.sub(r"\{\{.*?\}\}", "", line).strip()  # names of graph nodes
        for line in lines
        if not line.startswith(where)
    ]
    found = next(filter(None, [*causes, *lines, type(error).__name__]))
    return found.strip()[:300]
