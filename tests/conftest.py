"""Fixtures of several test files, made once per test process."""

import pathlib
import signal

import pytest

from clsa_tf import methods
from tests import exports, runs, toy
from tests.photos import write_folder


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        default="1/1",
        help="K/N: only every N-th test file, from the K-th on",
    )


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("part").split("/"))
    assert 1 <= part <= parts, config.getoption("part")
    files = sorted(pathlib.Path(__file__).parent.glob("test_*.py"))
    chosen = files[part - 1 :: parts]
    left_out = [item for item in items if item.path not in chosen]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.path in chosen]


@pytest.fixture(scope="session", autouse=True)
def signals():
    """Restores signals that `nohup` or a shell's `&` made us ignore."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    for number, handler in usual.items():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def toy_method():
    """The module of the method that only the tests know."""
    toy.register()
    yield toy
    methods.METHODS.pop("toy")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """60 photographs in two classes."""
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def finished(photos, tmp_path_factory):
    """The directory and the output of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    command = runs.train(photos, workdir, "--checkpoint_steps=1", draw=True)
    result = runs.call(command)
    return workdir, result


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A run and its export, `exports.Exported`. Tests must not change it."""
    return exports.make(tmp_path_factory.mktemp("run"))
