"""Fixtures of several test files, made once per test process."""

import signal
import time

import pytest
import tensorflow as tf

from clsa_tf import methods
from tests import exports, runs, toy
from tests.photos import write_folder

# The files that take minutes, longest first. They begin first, so that all
# processes of pytest-xdist end at about the same time.
LONGEST = (
    "test_distribution.py",
    "test_survival.py",
    "test_methods.py",
    "test_workers.py",
    "test_looc_probe.py",
    "test_end_to_end.py",
    "test_interface.py",
    "test_backbones.py",
    "test_examples.py",
    "test_gallery.py",
)
_BEGUN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption(
        "--minutes",
        type=float,
        default=0,
        help="skip tests that have not begun after so many minutes; 0: none",
    )


def pytest_collection_modifyitems(items):
    def rank(item):
        name = item.path.name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    limit = item.config.getoption("minutes")
    if limit and time.monotonic() - _BEGUN > 60 * limit:
        pytest.skip(f"LEFT OUT after {limit:g} minutes")


def _rewrite_graphs(on):
    tf.config.optimizer.set_experimental_options(
        {"disable_meta_optimizer": not on}
    )


@pytest.fixture(scope="session", autouse=True)
def graphs_as_traced():
    """Switches off TensorFlow's rewriting of graphs in this process.

    It takes a third of the time of tests that build many graphs. Commands that
    tests start rewrite theirs, as they do for users.
    """
    _rewrite_graphs(False)


@pytest.fixture(scope="module")
def rewritten_graphs():
    """Switches it on: for numbers that must be equal to the bit."""
    _rewrite_graphs(True)
    yield
    _rewrite_graphs(False)


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
