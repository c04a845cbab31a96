"""A process of `clsa_tf.data_service` for tests."""

import re
import signal
import subprocess
import tempfile

from tests import runs

COMMAND = runs.command("clsa_tf.data_service")


class Service:
    """A service that runs within a `with` statement, on free ports."""

    def __init__(self, *flags):
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*COMMAND, "--expose", "--host=localhost", "--port=0", *flags],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=runs.environment(),
        )

    def __enter__(self):
        line = self._process.stdout.readline()
        match = re.fullmatch(
            r"serving on (grpc://localhost:\d+); point --data_service at it\n",
            line,
        )
        assert match, line
        self.address = match.group(1)
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()

    def errors(self):
        """Returns its stderr so far."""
        self._errors.seek(0)
        return self._errors.read()

    def send(self, number):
        self._process.send_signal(number)

    def end(self, number=signal.SIGTERM):
        """Asks it to end; returns its exit status."""
        self.send(number)
        return self._process.wait(30)
