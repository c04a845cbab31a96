"""SIGTERM and SIGINT: noted when they come, obeyed after the step."""

import contextlib
import os
import signal
import threading

from clsa_tf.errors import Stopped


class Interruption:
    """Notes the first SIGTERM or SIGINT while it is entered (`with`).

    After it a SIGINT (Ctrl-C) ends the program at once.

    Attributes:
        signal: number of the signal that came, or 0.
    """

    def __init__(self):
        """See the class."""
        self.signal = 0
        self._at_once = False
        self._before = {}

    def __enter__(self):
        """Takes the signals over, where Python lets it (main thread)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self):
        """While entered, a signal raises `Stopped`: nothing would be lost."""
        if self.signal:
            raise Stopped(self.signal)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number, _):
        if not self.signal:
            self.signal = number
            # The next one ends the process even inside of TensorFlow.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            doing = (
                "leaving the evaluation, which the next start makes up for"
                if self._at_once
                else "finishing the step and saving"
            )
            words = f"{signal.Signals(number).name}: {doing}"
            # Not `print`: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{words}; Ctrl-C ends at once\n".encode())
        if self._at_once:
            raise Stopped(self.signal)
