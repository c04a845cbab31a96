import os
import subprocess
import sys

import pytest

from clsa_tf import stack

KERAS_2 = stack.of_python(sys.version_info[:2]).keras
_LEGACY = "TF_USE_LEGACY_KERAS"
only_beside_keras_3 = pytest.mark.skipif(
    KERAS_2 == "keras", reason="Keras 3 is not installed beside TensorFlow 2.15"
)


@pytest.mark.parametrize(
    "python, tensorflow, keras",
    [
        ((3, 9), "2.15.0", "2.15.0"),
        ((3, 11), "2.15.1", "2.15.0"),
        ((3, 12), "2.21.0", "2.21.0"),
        ((3, 13), "2.21.1", "2.21.0"),
    ],
)
def test_known_versions_pass(python, tensorflow, keras):
    stack.check_versions(python, tensorflow, keras)


OLD = ("TensorFlow 2.15", "keras 2.15", "Python 3.9 to 3.11")
NEW = ("TensorFlow 2.21", "tf-keras 2.21", "Python 3.12 to 3.13")


@pytest.mark.parametrize(
    "python, tensorflow, keras, needed, received",
    [
        ((3, 12), "2.15.1", "2.15.0", NEW, "Python 3.12"),
        ((3, 13), "2.21.0", None, NEW, "tf-keras not installed"),
        ((3, 13), "2.22.0", "2.22.0", NEW, "TensorFlow 2.22.0"),
        ((3, 13), "2.210.0", "2.21.0", NEW, "TensorFlow 2.210.0"),
        ((3, 8), "2.15.1", "2.15.0", OLD, "Python 3.8"),
        ((3, 14), "2.21.0", "2.21.0", OLD + NEW, "Python 3.14"),
        ((3, 11), "2.16.1", "3.0.5", OLD, "TensorFlow 2.16.1, keras 3.0.5"),
        ((3, 11), "2.21.0", "2.21.0", OLD, "TensorFlow 2.21.0"),
        ((3, 11), "2.15.1", "3.0.5", OLD, "keras 3.0.5"),
        ((3, 11), None, None, OLD, "TensorFlow not installed"),
    ],
)
def test_other_versions_are_rejected_with_the_needed_ones(
    python, tensorflow, keras, needed, received
):
    with pytest.raises(ImportError) as error:
        stack.check_versions(python, tensorflow, keras)
    expected, _, found = str(error.value).partition("received ")
    for version in needed:
        assert version in expected
    assert received in found


def run(code, **environment):
    """Runs code in another process, which has not imported clsa_tf."""
    rest = {k: v for k, v in os.environ.items() if k != _LEGACY}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=rest | environment,
        capture_output=True,
        text=True,
    )


def test_both_ways_to_import_keras_give_keras_2():
    result = run(
        "import clsa_tf\n"
        "from tensorflow import keras\n"
        "from tensorflow.keras import layers\n"
        "assert layers.Dense is keras.layers.Dense\n"
        "print(keras.layers.Dense.__module__.split('.')[0])\n",
        # The other stack's setting, which users may have exported.
        TF_USE_LEGACY_KERAS="1",
    )
    assert result.stdout.strip() == KERAS_2.replace("-", "_"), result.stderr


@only_beside_keras_3
def test_tensorflow_with_keras_3_is_rejected():
    result = run("import tensorflow, clsa_tf")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "tf-keras 2.21" in last and "import clsa_tf" in last


@only_beside_keras_3
def test_tensorflow_with_keras_2_is_accepted():
    result = run("import tensorflow, clsa_tf", TF_USE_LEGACY_KERAS="1")
    assert result.returncode == 0, result.stderr


@only_beside_keras_3
def test_keras_3_by_the_environment_is_rejected():
    result = run("import clsa_tf", TF_USE_LEGACY_KERAS="0")
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"{_LEGACY}=1" in last and "'0'" in last
