"""What a command does with its terminal, from before TensorFlow is imported.

`begin` is called when `clsa_tf` is imported by one of its own commands, and
only then: a program of somebody else that imports the library keeps its own
logging, streams and signals. Such a program may call `quieten` before it
imports TensorFlow, as those in `examples/` do.
"""

import atexit
import contextlib
import errno
import io
import logging
import os
import re
import subprocess
import sys

from clsa_tf.terminal import native_log, signals

# What TensorFlow reads when it is imported: 0 prints everything, 1 no INFO, 2
# no WARNING either, 3 no ERROR either.
_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_PACKAGES = ("clsa_tf.", "export.")
# What a stream says whose reader, or whose terminal, is gone.
_GONE = (errno.EIO, errno.EPIPE)
_SECONDS_TO_DRAIN = 2


def is_command():
    """Whether this process was started as a command of this library.

    To be asked while the package is being imported: later `python -m` has
    replaced what it started with.
    """
    if sys.argv[:1] != ["-m"]:
        # The script that pip makes of a console command is named after it.
        name = os.path.basename(sys.argv[0]) if sys.argv else ""
        return name.startswith("clsa-")
    # Python 3.9 does not tell which module it starts.
    started = getattr(sys, "orig_argv", ["-m", _PACKAGES[0]])
    for i, argument in enumerate(started):
        # Joined with other options or with its value: -um, -mclsa_tf.train.
        option = re.fullmatch(r"-[A-Za-z]*?m(.*)", argument)
        if option:
            module = option[1] or "".join(started[i + 1 : i + 2])
            return module.startswith(_PACKAGES)
    return False


def begin():
    """Prepares the process of a command: streams, native log, signals."""
    quieten()
    _quieten_libraries()
    _survive_closed_terminal()
    signals.begin()


def quieten():
    """Keeps notes of TensorFlow's C++ code from standard error.

    Nothing happens if TF_CPP_MIN_LOG_LEVEL is set, which is how to see them, or
    if TensorFlow is imported already.

    The variable alone does not do it. Of what TensorFlow prints when nothing
    is wrong, some lines are ERRORs, and others pass by its own log: at 3, which
    hides true errors as well, TensorFlow 2.15 still prints two of them, and
    2.21 four. So the level is 2, and what native code writes to file descriptor
    2 goes through a process that leaves out what `native_log` lists. What
    Python writes does not: `sys.stderr` gets a descriptor of its own, which
    still is the terminal.
    """
    if _LEVEL in os.environ or "tensorflow" in sys.modules:
        return
    if not _is_descriptor_2(sys.stderr):  # closed, or a notebook's
        return
    os.environ[_LEVEL] = "2"
    with contextlib.suppress(OSError):  # then there is more to read
        _filter_native_log()


def _is_descriptor_2(stream):
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):
        return False


def _quieten_libraries():
    """Keeps two notes of Python libraries from the log, which warn of nothing.

    Keras compares the time that our callbacks take with that of a step, which
    on small networks or a slow disk is the shorter one; matplotlib tells that
    it looks for fonts, once per machine.
    """
    logging.getLogger("tensorflow").addFilter(
        lambda record: (
            "is slow compared to the batch" not in record.getMessage()
        )
    )
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def _filter_native_log():
    sys.stderr.flush()
    kept = os.dup(2)
    source, sink = os.pipe()
    process = subprocess.Popen(
        # Isolated: it depends on nothing that the user has set.
        [sys.executable, "-I", "-S", native_log.__file__],
        stdin=source,
        stdout=subprocess.DEVNULL,
        # Ctrl-C and the end of the terminal are not for it: it ends when
        # nobody has the other end of the pipe any more.
        start_new_session=True,
        cwd="/",
    )
    os.close(source)
    os.dup2(sink, 2)
    os.close(sink)
    sys.stderr = _stream(kept, sys.stderr)

    def end():
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os.dup2(kept, 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Its last lines come before the shell's prompt.
            process.wait(_SECONDS_TO_DRAIN)

    atexit.register(end)


class _TolerantFile(io.FileIO):
    """A file for what is printed, which may be closed at its other end."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as e:
            if e.errno not in _GONE:
                raise
            return len(data)


def _stream(descriptor, like):
    """A text stream to a descriptor, with the encoding of another one."""
    return io.TextIOWrapper(
        io.BufferedWriter(_TolerantFile(descriptor, "w", closefd=False)),
        encoding=like.encoding,
        errors=like.errors,
        # So that lines of both streams keep their order in a log file, and
        # none is lost by a process that ends at once.
        line_buffering=True,
    )


def _survive_closed_terminal():
    """Lets a run go on to save, and to say so, when its terminal is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # (None where it was closed before.)
        if stream is not None and not isinstance(
            getattr(stream.buffer, "raw", None), _TolerantFile
        ):
            stream.flush()
            setattr(sys, name, _stream(stream.fileno(), stream))
