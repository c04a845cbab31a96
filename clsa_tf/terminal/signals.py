"""SIGINT (Ctrl-C), SIGTERM and SIGHUP: acknowledged at once, obeyed in time.

Python calls the handler of a signal between two of its instructions, and a
compilation by TensorFlow is one instruction of a minute. So a thread waits for
signals: it answers in a line of text whatever the main thread is doing.
"""

import contextlib
import os
import signal
import sys
import threading

from clsa_tf.errors import Stopped

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# After so long a command that was asked to stop ends without tidying up: it is
# in C++ code, which knows nothing of signals.
_GRACE_SECONDS = 3.0

# Of a command, from its first moment on, see `begin`.
_of_process = None


class Interruption:
    """Heeds the signals while it is entered (`with`), by one of three ways.

    * By default the first one is noted, and who entered looks for it when it
      suits.
    * Within `at_once`, where nothing would be lost, it ends the program.
    * With `stop` it raises `Stopped` in the main thread, as Ctrl-C raises
      KeyboardInterrupt.

    After the first one a SIGINT ends a command at once; in a program of
    somebody else it raises KeyboardInterrupt in the main thread. A SIGHUP that
    is ignored when it is entered, as under `nohup`, stays ignored.

    Args:
        doing: what is done about a signal, in words.
        stop: see above.

    Attributes:
        signal: number of the signal that came, or 0.
    """

    def __init__(self, doing="finishing the step and saving", *, stop=False):
        """See the class."""
        self.signal = 0
        self._doing = doing
        self._stop = stop
        self._obeyed = False
        self._losing_nothing = ""
        self._before = {}
        self._acknowledged = threading.Event()

    def __enter__(self):
        """Takes the signals over, where Python lets it (main thread)."""
        if threading.current_thread() is not threading.main_thread():
            return self
        source, self._sink = os.pipe()
        os.set_blocking(self._sink, False)
        # Before the handlers: none may come that the thread does not hear of.
        self._sink_before = signal.set_wakeup_fd(
            self._sink, warn_on_full_buffer=False
        )
        for number in _NUMBERS:
            if (
                number != signal.SIGHUP
                or signal.getsignal(number) != signal.SIG_IGN
            ):
                self._before[number] = signal.signal(number, self._obey)
        threading.Thread(
            target=self._listen, args=[source], daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        """Gives the signals back."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        # Somebody else may have taken them over meanwhile, as asyncio does.
        now = signal.set_wakeup_fd(self._sink_before)
        if now not in (self._sink, -1):
            signal.set_wakeup_fd(now)
        os.close(self._sink)  # which ends the thread

    @contextlib.contextmanager
    def at_once(self, what):
        """While entered, a signal ends the program: nothing would be lost.

        A command ends within the same moment; otherwise `Stopped` is raised in
        the main thread as soon as Python has its turn.

        Args:
            what: that is left, in words, such as "leaving the evaluation".
        """
        self.lose_nothing(what)
        try:
            yield
        finally:
            self.lose_nothing("")

    def lose_nothing(self, what):
        """Begins what `at_once` does, or ends it if `what` is empty."""
        if what and self.signal:
            raise Stopped(self.signal)
        self._losing_nothing = what

    def _listen(self, source):
        """Runs in a thread of its own until the signals are given back."""
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
        if self._losing_nothing and ends_process():
            _say(f"{name}: {self._losing_nothing}")
            _end(number)
        doing = self._losing_nothing or self._doing
        again = "ends at once" if ends_process() else "again does not wait"
        _say(f"{name}: {doing}; Ctrl-C {again}")
        if self._stop and ends_process():
            timer = threading.Timer(_GRACE_SECONDS, _end, [number])
            timer.daemon = True
            timer.start()

    def _obey(self, number, _):
        """Python calls this in the main thread when that has its turn."""
        again, self._obeyed = self._obeyed, True
        if again and number == signal.SIGINT and not ends_process():
            raise KeyboardInterrupt
        if self._stop or (self._losing_nothing and not ends_process()):
            # Whoever handles it looks at `signal`, or prints something.
            self._acknowledged.wait(_GRACE_SECONDS)
            raise Stopped(number, saved=None if self._stop else True)


def ends_process():
    """Whether this process is a command, which a signal may end."""
    return _of_process is not None


def begin():
    """Lets signals end this process, which is a command, from now on.

    Until the command itself takes them over there is nothing to lose, and a
    traceback out of an import would tell nothing.
    """
    global _of_process
    _of_process = Interruption()
    _of_process.lose_nothing("ended while starting; nothing was begun")
    _of_process.__enter__()


def started():
    """To be called by a command that has taken the signals over itself."""
    if _of_process:
        # What is left for `_of_process` is what comes after the command.
        _of_process.lose_nothing("ended while leaving")


def _say(words):
    # Not `print`: the main thread may be in the middle of one. It ends the
    # line of a progress bar, or of what the terminal shows for Ctrl-C.
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # replaced, or closed
        descriptor = 2
    with contextlib.suppress(OSError):
        os.write(descriptor, f"\n{words}\n".encode())


def _end(number):
    os._exit(128 + number)
