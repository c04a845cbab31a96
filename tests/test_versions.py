import pytest

import clsa_tf


def test_known_versions_pass():
    clsa_tf._check_versions((3, 9), "2.15.0", "2.15.0")
    clsa_tf._check_versions((3, 11), "2.15.1", "2.15.0")


@pytest.mark.parametrize(
    "python, tensorflow, keras, words",
    [
        ((3, 12), "2.15.1", "2.15.0", "Python 3.12"),
        ((3, 8), "2.15.1", "2.15.0", "Python 3.8"),
        ((3, 11), "2.16.1", "3.0.5", "TensorFlow 2.16.1, Keras 3.0.5"),
        ((3, 11), "2.15.1", "3.0.5", "Keras 3.0.5"),
        ((3, 11), None, None, "TensorFlow not installed"),
    ],
)
def test_others_are_named_with_what_is_needed(python, tensorflow, keras, words):
    with pytest.raises(ImportError) as error:
        clsa_tf._check_versions(python, tensorflow, keras)
    assert words in str(error.value)
    assert "Python 3.9 to 3.11 and TensorFlow 2.15" in str(error.value)
