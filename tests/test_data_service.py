"""Views made by real processes of `clsa_tf.data_service`, byte for byte."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf import metrics
from clsa_tf.augment.views import View
from clsa_tf.data import offload
from clsa_tf.data.faults import Faults
from clsa_tf.data.offload import Services
from clsa_tf.data.order import Worker
from clsa_tf.data.sources import open_source
from clsa_tf.errors import UserError
from tests.photos import TINY_FLAGS, write_folder
from tests.test_data_pipeline import (
    assert_same,
    batches,
    contents,
    one_sentence,
    photo_folder,
    picture,
)

VIEWS = (
    View("query", 8, 0.2, 1.0),
    View("key", 8, 0.2, 1.0, shuffle=True),
    View("strong", 6, 0.2, 1.0, strong_ops=1),
)
COMMAND = [sys.executable, "-m", "clsa_tf.data_service"]
ENVIRONMENT = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}


class Service:
    """A process of the command, on free ports."""

    def __init__(self, *flags):
        self.process = subprocess.Popen(
            [*COMMAND, "--expose", "--host=localhost", "--port=0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT,
        )

    def address(self):
        line = self.process.stdout.readline()
        match = re.fullmatch(
            r"serving on (grpc://localhost:\d+); point --data_service at it\n",
            line,
        )
        assert match, line
        return match.group(1)

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def addresses():
    processes = [Service(), Service()]
    try:
        yield tuple(process.address() for process in processes)
    finally:
        for process in processes:
            process.process.kill()
            process.process.wait()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Twelve PNGs, a small JPEG, and one that is not decoded whole."""
    path = tmp_path_factory.mktemp("photos")
    for name, size in (("b.jpg", (31, 23)), ("c.jpg", (90, 70))):
        (path / name).write_bytes(contents(picture(5, size), "JPEG"))
    return photo_folder(path)


@pytest.fixture(scope="module")
def whole(source):
    """Steps 0 … 6 without a service."""
    return batches(source, 7, views=VIEWS)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("start", [0, 3])
def test_batches_are_the_same(addresses, source, whole, count, start):
    services = Services(addresses[:count])
    services.check()
    steps = batches(
        source, 7 - start, start=start, views=VIEWS, services=services
    )
    assert_same(steps, whole[start:])
