"""Files and runs of one stack of `clsa_tf.stack` work on the other stack.

CLSA_TF_OTHER_PYTHON names the Python of the other one (`make test-tf221`).
"""

import os
import sys

import numpy as np
import pytest

from tests import runs

OTHER = os.environ.get("CLSA_TF_OTHER_PYTHON")
pytestmark = pytest.mark.skipif(
    not OTHER, reason="CLSA_TF_OTHER_PYTHON names no other Python"
)
# (writer, reader)
BOTH = pytest.mark.parametrize(
    "first, second",
    [(sys.executable, OTHER), (OTHER, sys.executable)],
    ids=["to the other", "from the other"],
)


def on(python, arguments):
    """Returns a command of `runs` for one of the stacks."""
    return [python, *arguments[1:]]


def call(python, *arguments):
    return runs.call(on(python, runs.command("tests.stacks", *arguments)))


def test_the_stacks_are_different():
    code = "import clsa_tf.stack as s; print(s.versions()['tensorflow'])"
    found = {
        runs.call([python, "-c", code]).stdout
        for python in (sys.executable, OTHER)
    }
    assert found == {"2.15.1\n", "2.21.0\n"}


def test_views_are_the_same_bytes(photos, tmp_path):
    found = []
    for python in (sys.executable, OTHER):
        path = tmp_path / f"{len(found)}.npz"
        call(python, "views", photos, path)
        found.append(np.load(path))
    assert {*found[0]} == {"weak", "strong"}
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])
        assert len(np.unique(found[0][name])) > 100


@BOTH
def test_exports_and_files_load_on_both_stacks(first, second, tmp_path):
    call(first, "write", tmp_path)
    found = []
    for python in (first, second):
        path = tmp_path / f"{len(found)}.npz"
        call(python, "read", tmp_path, path)
        found.append(np.load(path))
    expected = found[0]["served"]
    scale = np.abs(expected).max()
    assert np.ptp(expected, axis=0).max() > 0.01 * scale  # images differ
    assert len(found[1].files) == 5
    for name, value in [*found[0].items(), *found[1].items()]:
        np.testing.assert_allclose(
            value, expected, rtol=0, atol=1e-5 * scale, err_msg=name
        )


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    """The last state of a run on this stack alone."""
    workdir = tmp_path_factory.mktemp("straight")
    runs.call(runs.train(photos, workdir, *FLAGS))
    return runs.final_state(workdir)


# LAMB is tensorflow-addons' on one stack and our own on the other.
FLAGS = ("--optimizer=lamb", "--base_lr=0.005", "--checkpoint_steps=1")


@BOTH
def test_runs_resume_on_the_other_stack(
    first, second, photos, straight, tmp_path
):
    arguments = runs.train(photos, tmp_path, *FLAGS)
    process = runs.start(on(first, arguments))
    try:
        assert runs.wait_until(
            lambda: runs.saved(tmp_path, 4), process, seconds=600
        )
    finally:
        process.kill()
        process.wait()
    assert "resuming" in runs.call(on(second, arguments)).stdout
    (name, found), (expected_name, expected) = (
        runs.final_state(tmp_path),
        straight,
    )
    assert name == expected_name == "step-9"
    assert found.keys() == expected.keys()
    for key, value in found.items():
        scale = np.abs(expected[key]).max() if value.size else 0
        np.testing.assert_allclose(
            value, expected[key], rtol=0, atol=1e-3 * scale, err_msg=key
        )
