"""Supported versions of Python, TensorFlow and Keras; selects Keras 2.

The version of Python determines the rest. TensorFlow 2.15 has packages up to
Python 3.11 and uses Keras 2, the package `keras`. TensorFlow 2.21 uses Keras 3
as `tf.keras`, unless an environment variable selects Keras 2, the package
`tf-keras`. TensorFlow reads that variable when it is imported.
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
import typing

_LEGACY = "TF_USE_LEGACY_KERAS"


class Stack(typing.NamedTuple):
    """Versions that are tested together.

    Attributes:
        pythons: first and last version of Python, each (major, minor).
        release: version `"major.minor"` of TensorFlow and of Keras.
        keras: distribution with Keras 2. Its package has `_` in place of `-`.
    """

    pythons: tuple
    release: str
    keras: str

    def __str__(self):
        first, last = (".".join(map(str, python)) for python in self.pythons)
        return (
            f"TensorFlow {self.release} with {self.keras} {self.release} "
            f"(Python {first} to {last})"
        )


STACKS = (
    Stack(((3, 9), (3, 11)), "2.15", "keras"),
    Stack(((3, 12), (3, 13)), "2.21", "tf-keras"),
)


def of_python(python):
    """Returns the `Stack` of a version of Python, (major, minor), or None."""
    for stack in STACKS:
        first, last = stack.pythons
        if first <= python <= last:
            return stack
    return None


def choose():
    """Selects the stack of this Python; call it before TensorFlow is imported.

    Raises:
        ImportError: other versions are installed, or TensorFlow was already
            imported with another Keras.
    """
    python = sys.version_info[:2]
    stack = of_python(python)
    keras = stack.keras if stack else "keras"
    check_versions(python, _tensorflow(), _installed(keras))
    _choose_keras(stack)


def check_versions(python, tensorflow, keras):
    """Raises ImportError unless these versions are tested together.

    Args:
        python: tuple of int, (major, minor).
        tensorflow: version string, or None if it is not installed.
        keras: version string of the stack's Keras distribution, or None if it
            is not installed.
    """
    stack = of_python(python)
    if stack and all(
        version and version.startswith(stack.release + ".")
        for version in (tensorflow, keras)
    ):
        return
    needed = str(stack) if stack else ", or ".join(map(str, STACKS))
    raise ImportError(
        f"Expected {needed}, received Python {'.'.join(map(str, python))}, "
        f"TensorFlow {tensorflow or 'not installed'}, "
        f"{stack.keras if stack else 'keras'} {keras or 'not installed'}; "
        "install these versions as described in BUILD.md."
    )


def versions():
    """Versions in use, dict of str -> str; does not import TensorFlow."""
    stack = of_python(sys.version_info[:2])
    return {
        "clsa_tf": sys.modules["clsa_tf"].__version__,
        "tensorflow": _tensorflow(),
        "keras": _installed(stack.keras),
        "python": platform.python_version(),
    }


def written_by(what, versions):
    """Names the versions of clsa_tf that wrote something, and the present one.

    Args:
        what: what they wrote, as the subject of a sentence.
        versions: list of str, oldest first; may be empty.

    Returns:
        str, the end of an error message; "" if there are no versions.
    """
    if not versions:
        return ""
    return (
        f" {what} was written by clsa_tf {', then '.join(versions)}; this is "
        f"clsa_tf {sys.modules['clsa_tf'].__version__}."
    )


def describe():
    """Text of `--version`: the `versions`, one per line."""
    return "\n".join(
        f"{name} {version}" for name, version in versions().items()
    )


def _choose_keras(stack):
    if stack.keras == "keras":
        # With this variable, TensorFlow 2.15 would look for tf-keras. Without
        # it, its Keras is Keras 2.
        os.environ.pop(_LEGACY, None)
    else:
        value = os.environ.setdefault(_LEGACY, "1")
        if value not in ("1", "true", "True"):  # as in TensorFlow
            raise ImportError(
                f"Expected {_LEGACY}=1 in the environment, received {value!r}, "
                "which selects Keras 3; set it to 1 or unset it."
            )
    if "tensorflow" not in sys.modules:
        return
    found = importlib.util.find_spec("tensorflow.keras")
    place = os.path.join(
        stack.keras.replace("-", "_"), "api", "_v2", "keras", "__init__.py"
    )
    if found is None or not found.origin.endswith(place):
        raise ImportError(
            f"Expected {stack.keras} {stack.release} as tf.keras, received "
            f"{found.origin if found else 'none'}, because TensorFlow was "
            "imported before clsa_tf; import clsa_tf first."
        )


def _tensorflow():
    return _installed("tensorflow", "tensorflow-cpu", "tensorflow-macos")


def _installed(*names):
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
