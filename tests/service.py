"""A process of `clsa_tf.data_service` for tests."""

import os
import re
import signal
import subprocess
import sys

COMMAND = [sys.executable, "-m", "clsa_tf.data_service"]
ENVIRONMENT = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}


class Service:
    """Runs while it is entered (`with`), on free ports unless told."""

    def __init__(self, *flags):
        self._process = subprocess.Popen(
            [*COMMAND, "--expose", "--host=localhost", "--port=0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT,
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

    def end(self, number=signal.SIGTERM):
        """Asks it to end; returns its exit status."""
        self._process.send_signal(number)
        return self._process.wait(30)
