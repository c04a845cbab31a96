"""Files: locks, atomic writes, and search for a SavedModel."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile

from clsa_tf import stack

# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_SAVEDMODEL = "saved_model.pb"
# Machine-readable descriptions of an export: in the directory of a SavedModel,
# and next to the files of `export.formats`.
MODEL_CARD = "model_card.json"
FORMATS = "formats.json"


class Locked(Exception):
    """Another process holds the lock; the message names its owner."""


def lock(path, *, wait=False):
    """Takes an exclusive lock, which is released when the process ends.

    On a file system without locks it always succeeds and excludes no process.

    Args:
        path: lock file; it contains the name of the owner.
        wait: whether to wait for another owner.

    Returns:
        a context manager that releases the lock.

    Raises:
        Locked: another process holds the lock, unless `wait`.
        OSError: the file cannot be written.
    """
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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


@contextlib.contextmanager
def replacing(path, *, draft=None):
    """Replaces a file atomically: a reader sees the old or the new one.

    At the end of the block the draft is published. If the block raises, the
    draft is removed and the old file stays.

    Args:
        path: of the file.
        draft: path of the draft on the same file system; the default is `path`
            with the suffix `.draft`.

    Yields:
        the path of the draft, which the block has to write.
    """
    draft = draft or path + ".draft"
    try:
        yield draft
        publish(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(draft)
        raise


@contextlib.contextmanager
def draft_directory(parent):
    """Makes a temporary directory, which is removed after the block.

    The block writes and checks files in it and then renames them, or the
    directory, to their places in `parent`. That is atomic, because both are on
    one file system. Servers ignore the directory: its name is not a number.

    Args:
        parent: existing directory.

    Yields:
        the path of the directory, which only this user can read.
    """
    draft = tempfile.mkdtemp(prefix=".draft-", dir=parent)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_atomically(path, text, *, errors="strict"):
    """Writes a text file as UTF-8, see `replacing`.

    Args:
        path: of the file.
        text: contents.
        errors: what to do with characters that UTF-8 cannot encode, as in
            `open`.
    """
    with replacing(path) as draft:
        with open(draft, "w", encoding="utf-8", errors=errors) as file:
            file.write(text)


def read_json_lines(path):
    """Reads a file with one JSON value per line into a list.

    Incomplete lines, from a process that was killed, are skipped. If there is
    no file, the list is empty.
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


def publish(draft, path):
    """Flushes a finished file or directory to the disk, then renames it.

    Args:
        draft: file, or directory with all its files.
        path: its place on the same file system. An existing file is replaced.

    Raises:
        OSError: among others, if `path` is a directory that is not empty.
    """
    for folder, _, names in os.walk(draft):
        for name in (*names, ""):
            _flush(os.path.join(folder, name))
    if not os.path.isdir(draft):
        _flush(draft)
    os.replace(draft, path)
    _flush(os.path.dirname(path) or ".")


def _flush(path):
    """Flushes a file's contents, or a directory's entries, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def export_written_by(path):
    """Names the version of clsa_tf that wrote an export, for messages.

    Args:
        path: directory of a SavedModel, or a file of `export.formats`.

    Returns:
        see `stack.written_by`; "" if the version is not recorded.
    """
    if os.path.isdir(path):
        description, keys = os.path.join(path, MODEL_CARD), ()
    else:
        folder, name = os.path.split(path)
        description, keys = os.path.join(folder, FORMATS), (name,)
    try:
        with open(description, encoding="utf-8") as file:
            found = json.load(file)
        for key in (*keys, "made_with", "clsa_tf"):
            found = found[key]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return stack.written_by("The export", [str(found)])


def newest_savedmodel(path):
    """Finds a SavedModel in a directory or in its versions.

    Args:
        path: directory of the model, or the parent directory of its versions,
            which have numbers as names.

    Returns:
        directory of the model or of the newest version; None if there is none.
    """
    names = os.listdir(path) if os.path.isdir(path) else []
    versions = sorted(filter(str.isdecimal, names), key=int, reverse=True)
    for folder in (path, *(os.path.join(path, name) for name in versions)):
        if os.path.exists(os.path.join(folder, _SAVEDMODEL)):
            return folder
    return None
