"""One process at a time in a directory."""

import errno
import fcntl
import os
import socket

from clsa_tf.errors import UserError

FILE = "lock"

# What file systems say that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def acquire(directory):
    """Takes the lock of `directory`.

    The operating system gives it back when the process ends, however it ends.
    Where a file system knows no locks, there is none.

    Returns:
        a context manager that gives it back.

    Raises:
        UserError: another process holds it.
        OSError: the directory cannot be written.
    """
    file = open(os.path.join(directory, FILE), "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"Expected a --workdir that no other run uses, received "
            f"{directory!r}, in use by {owner}; wait for it or choose another."
        ) from e
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
