"""What is written whole, locked, and found again on disk."""

import errno
import fcntl
import json
import os
import socket

# What file systems say that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_SAVEDMODEL = "saved_model.pb"
# What an export says of itself, for programs.
MODEL_CARD = "model_card.json"


class Locked(Exception):
    """Somebody else has a lock; says who."""


def lock(path):
    """Takes a lock, which the operating system gives back at the end.

    On a file system that knows no locks nothing keeps two processes apart.

    Args:
        path: of a file for it, which says whose it is.

    Returns:
        a context manager that gives it back.

    Raises:
        Locked: another process has it.
        OSError: it cannot be written.
    """
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise Locked(owner) from e
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def write_atomically(path, text):
    """Writes a text file so that a reader sees all of it or none."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def read_json_lines(path):
    """Returns the list of JSON values in a file of one per line.

    A line that was cut short by a kill is left out. Without a file the list is
    empty.
    """
    if not os.path.exists(path):
        return []
    values = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                values.append(json.loads(line))
            except ValueError:
                continue
    return values


def flush_to_disk(path):
    """Makes what was written to a file, or moved into a directory, lasting."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def newest_savedmodel(path):
    """Finds a SavedModel.

    Args:
        path: its directory, or that of its versions.

    Returns:
        its directory; of versions, which have numbers for names, the newest
        one's; None if there is none.
    """
    names = os.listdir(path) if os.path.isdir(path) else []
    versions = sorted(filter(str.isdecimal, names), key=int, reverse=True)
    for folder in (path, *(os.path.join(path, name) for name in versions)):
        if os.path.exists(os.path.join(folder, _SAVEDMODEL)):
            return folder
    return None
