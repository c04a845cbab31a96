"""Sets up the terminal of a command, before TensorFlow is imported.

`begin` runs when one of this package's commands imports `clsa_tf`. A user's
program that imports the library keeps its own logging, streams and signals. It
may call `clsa_tf.quieten` before it imports TensorFlow, as the programs in
`examples/` do.
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

# TensorFlow reads this when it is imported: 0 prints everything, 1 hides INFO,
# 2 also WARNING, 3 also ERROR.
_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_PACKAGES = ("clsa_tf.", "export.")
# Errors of a stream whose reader or terminal is closed.
_GONE = (errno.EIO, errno.EPIPE)
_SECONDS_TO_DRAIN = 2


def is_command():
    """Whether this process was started as a command of this package.

    Valid only while the package is being imported; later `python -m` replaces
    `sys.argv[0]`.
    """
    if sys.argv[:1] != ["-m"]:
        # pip names the script of a console command after the command.
        name = os.path.basename(sys.argv[0]) if sys.argv else ""
        return name.startswith("clsa-")
    # Python 3.9 has no `sys.orig_argv`; assume one of our modules.
    started = getattr(sys, "orig_argv", ["-m", _PACKAGES[0]])
    for i, argument in enumerate(started):
        # May be joined with other options or the value: -um, -mclsa_tf.train.
        option = re.fullmatch(r"-[A-Za-z]*?m(.*)", argument)
        if option:
            module = option[1] or "".join(started[i + 1 : i + 2])
            return module.startswith(_PACKAGES)
    return False


def begin():
    """Sets up the process of a command: streams, native log, signals."""
    quieten()
    share_gpus()
    _quieten_libraries()
    _survive_closed_terminal()
    signals.begin()


def share_gpus():
    """Lets TensorFlow take a GPU's memory as it needs it.

    Otherwise the first process takes all of it, and the processes that it
    starts find none. This does nothing if TF_FORCE_GPU_ALLOW_GROWTH is set. It
    has no effect after TensorFlow has used a GPU.
    """
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


def quieten():
    """Hides harmless messages of TensorFlow's C++ code on standard error.

    This does nothing if TF_CPP_MIN_LOG_LEVEL is set (set it to see the
    messages), or if TensorFlow is already imported.

    The variable alone is not enough. TensorFlow logs some harmless messages as
    ERROR and writes others outside its log: with level 3, which also hides true
    errors, TensorFlow 2.15 still prints two of them, and 2.21 four. Therefore
    the level is set to 2, and a separate process filters everything that native
    code writes to file descriptor 2, see `native_log`. Output of Python is not
    filtered: `sys.stderr` gets another descriptor of the terminal.
    """
    if _LEVEL in os.environ or "tensorflow" in sys.modules:
        return
    if not _is_descriptor_2(sys.stderr):  # closed, or of a notebook
        return
    os.environ[_LEVEL] = "2"
    with contextlib.suppress(OSError):  # without the filter, more is printed
        _filter_native_log()


def _is_descriptor_2(stream):
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):
        return False


def _quieten_libraries():
    """Hides two harmless messages of Python libraries.

    Keras warns if callbacks take longer than a step, which happens with small
    networks or a slow disk. matplotlib reports its search for fonts, once per
    machine.
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
        # Isolated from the user's environment variables and site packages.
        [sys.executable, "-I", "-S", native_log.__file__],
        stdin=source,
        stdout=subprocess.DEVNULL,
        # Ctrl-C and a closed terminal do not reach it. It ends when the other
        # end of the pipe is closed.
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
            # Print its last lines before the shell's prompt.
            process.wait(_SECONDS_TO_DRAIN)

    atexit.register(end)


class _TolerantFile(io.FileIO):
    """An output file whose other end may be closed; writes then do nothing."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as e:
            if e.errno not in _GONE:
                raise
            return len(data)


def _stream(descriptor, like):
    """A text stream to a descriptor, with the encoding of the stream `like`."""
    return io.TextIOWrapper(
        io.BufferedWriter(_TolerantFile(descriptor, "w", closefd=False)),
        encoding=like.encoding,
        errors=like.errors,
        # Lines of both streams keep their order in a log file, and none is lost
        # if the process ends abruptly.
        line_buffering=True,
    )


def _survive_closed_terminal():
    """Lets a run continue and save after its terminal is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # (None if it was closed at the start.)
        if stream is not None and not isinstance(
            getattr(stream.buffer, "raw", None), _TolerantFile
        ):
            stream.flush()
            setattr(sys, name, _stream(stream.fileno(), stream))
