"""The exceptions that mean: not the program, but the world outside it."""

import errno
import os
import re
import signal
from typing import Optional

# What an operating system says of a disk that cannot be used.
_OF_DISKS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ESTALE,
)


class UserError(Exception):
    """Wrong input from outside: a flag, a file, an image, a checkpoint.

    The message is one sentence of the form *expected …, received …; do …*.
    Entry points print it without a traceback and exit with status 1.
    """


class Stopped(BaseException):
    """The run was asked to stop by a signal.

    Entry points exit with status 128 + signal, as the shell says it. It is no
    `Exception`, as KeyboardInterrupt is none: libraries that handle every
    exception, or wrap it into one of theirs, let it pass.

    Attributes:
        signal: number of the signal.
        saved: whether all that the run had done is saved; None where there is
            nothing to save.
    """

    def __init__(self, number, *, saved: Optional[bool] = True):
        """See the class."""
        super().__init__(signal.Signals(number).name)
        self.signal = number
        self.saved = saved


class WorkerLost(Exception):
    """Another process of the same job is gone; nothing can go on without it.

    Entry points exit with status 138: Kubernetes' training operator takes it,
    as those above it, for a failure that is worth a new start.
    """

    STATUS = 138


def is_of_disk(error):
    """Whether an exception says that a disk is full or cannot be used.

    TensorFlow and HDF5 have the words of the operating system in messages of
    their own.
    """
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and number is not None:
        return number in _OF_DISKS
    return any(os.strerror(x) in str(error) for x in _OF_DISKS)


def first_line(error):
    """What an error says, in one line without TensorFlow's node names."""
    text = getattr(error, "message", None) or str(error)
    # What happened stands below where in the graph it did.
    where = ("Graph execution error", "Detected at node", "<stack", " ")
    lines = [line for line in text.split("\n") if line.strip()]
    said = [
        re.sub(r"\{\{.*?\}\}", "", line).strip()  # names of graph nodes
        for line in lines
        if not line.startswith(where)
    ]
    found = next(filter(None, [*said, *lines, type(error).__name__]))
    return found.strip()[:300]
