"""Handles SIGINT (Ctrl-C), SIGTERM and SIGHUP.

Python calls signal handlers between two of its instructions, and a compilation
by TensorFlow is one instruction of a minute. Therefore a thread waits for
signals and acknowledges them with a line of text at once, whatever the main
thread is doing.
"""

import contextlib
import os
import signal
import sys
import threading

from clsa_tf.errors import Stopped

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A command that was asked to stop, but still runs C++ code after this time,
# exits without cleaning up.
_GRACE_SECONDS = 3.0

# The `Interruption` of a command's whole process, see `begin`.
_of_process = None


class Interruption:
    """Context manager that handles signals, in one of three ways.

    * By default it records the first signal. The caller polls `signal`.
    * Within `at_once`, where no work would be lost, a signal ends the program.
    * With `stop` a signal raises `Stopped` in the main thread, as Ctrl-C raises
      KeyboardInterrupt.

    After the first signal a SIGINT ends a command at once. In a user's program
    it raises KeyboardInterrupt in the main thread instead. A SIGHUP that was
    ignored before, as under `nohup`, stays ignored.

    Args:
        doing: reaction to a signal, for the line of text that acknowledges it.
        stop: see above.

    Attributes:
        signal: number of the first signal received, or 0.
    """

    def __init__(self, doing="finishing the step and saving", *, stop=False):
        """See the class."""
        self.signal = 0
        self._doing = doing
        self._stop = stop
        self._handled = False
        self._exit_message = ""
        self._before = {}
        self._acknowledged = threading.Event()

    def __enter__(self):
        """Installs the handlers; Python allows this in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return self
        source, self._sink = os.pipe()
        os.set_blocking(self._sink, False)
        # Set before the handlers, so that the thread misses no signal.
        self._sink_before = signal.set_wakeup_fd(
            self._sink, warn_on_full_buffer=False
        )
        for number in _NUMBERS:
            if (
                number != signal.SIGHUP
                or signal.getsignal(number) != signal.SIG_IGN
            ):
                self._before[number] = signal.signal(number, self._handle)
        threading.Thread(
            target=self._listen, args=[source], daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        """Restores the previous handlers."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        # Other code, such as asyncio, may have replaced the descriptor.
        now = signal.set_wakeup_fd(self._sink_before)
        if now not in (self._sink, -1):
            signal.set_wakeup_fd(now)
        os.close(self._sink)  # which ends the thread

    @contextlib.contextmanager
    def at_once(self, what):
        """Context manager for code whose interruption loses no work.

        Within it a signal ends a command at once. In a user's program it raises
        `Stopped` in the main thread at the next Python instruction.

        Args:
            what: message, such as "leaving the evaluation".
        """
        before = self._exit_message
        self.set_at_once(what)
        try:
            yield
        finally:
            self._exit_message = before

    def set_at_once(self, what):
        """Enters the state of `at_once`, or leaves it if `what` is empty.

        Unlike `at_once` it is not undone at the end of a block.
        """
        if what and self.signal:
            raise Stopped(self.signal)
        self._exit_message = what

    def _listen(self, source):
        """Runs in a thread until the handlers are restored."""
        with open(source, "rb", buffering=0) as file:
            while number := file.read(1):
                if number[0] in _NUMBERS:
                    self._acknowledge(number[0])
                    self._acknowledged.set()

    def _acknowledge(self, number):
        if self.signal:
            if number == signal.SIGINT and ends_process():
                _end(number)
            return
        self.signal = number
        name = signal.Signals(number).name
        if self._exit_message and ends_process():
            _write(f"{name}: {self._exit_message}")
            _end(number)
        doing = self._exit_message or self._doing
        again = "exits" if ends_process() else "interrupts"
        _write(f"{name}: {doing}; Ctrl-C {again} immediately")
        if self._stop and ends_process():
            timer = threading.Timer(_GRACE_SECONDS, _end, [number])
            timer.daemon = True
            timer.start()

    def _handle(self, number, _):
        """Signal handler, which Python calls in the main thread."""
        again, self._handled = self._handled, True
        if again and number == signal.SIGINT and not ends_process():
            raise KeyboardInterrupt
        if self._stop or (self._exit_message and not ends_process()):
            # Let the thread set `signal` and print its line first.
            self._acknowledged.wait(_GRACE_SECONDS)
            raise Stopped(number, saved=None if self._stop else True)


def ends_process():
    """Whether this process is a command, so that a signal may end it."""
    return _of_process is not None


def begin():
    """Makes signals end this process, a command, from now on.

    Until the command installs its own handling no work can be lost, and the
    traceback of an interrupted import would not help.
    """
    global _of_process
    _of_process = Interruption()
    _of_process.set_at_once("stopped during start-up; no work was lost")
    _of_process.__enter__()


def started():
    """Call this after the command has installed its own handling."""
    if _of_process:
        # From now on `_of_process` handles only signals after the command.
        _of_process.set_at_once("stopped while exiting")


def _write(words):
    # Not `print`, because the main thread may be within one. The leading
    # newline ends the line of a progress bar or of the terminal's ^C.
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # replaced, or closed
        descriptor = 2
    with contextlib.suppress(OSError):
        os.write(descriptor, f"\n{words}\n".encode())


def _end(number):
    os._exit(128 + number)
