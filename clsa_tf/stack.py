"""Which Python, TensorFlow and Keras go together, and the choice of Keras 2.

The version of Python decides: TensorFlow 2.15 has no packages beyond Python
3.11, and brings Keras 2 as `keras`. TensorFlow 2.21 has Keras 3 as
`tf.keras` unless it is told to take Keras 2, the package `tf-keras`, and it is
told by an environment variable that it reads when it is imported.
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
        pythons: first and last version of Python, (major, minor).
        release: of TensorFlow and of Keras, `"major.minor"`.
        keras: distribution that Keras 2 is in; its package has `_` for `-`.
    """

    pythons: tuple
    release: str
    keras: str

    def __str__(self):
        first, last = (".".join(map(str, python)) for python in self.pythons)
        return (
            f"on Python {first} to {last} TensorFlow {self.release} with "
            f"{self.keras} {self.release}"
        )


STACKS = (
    Stack(((3, 9), (3, 11)), "2.15", "keras"),
    Stack(((3, 12), (3, 13)), "2.21", "tf-keras"),
)


def of_python(python):
    """The `Stack` of a version of Python, (major, minor), or None."""
    for stack in STACKS:
        first, last = stack.pythons
        if first <= python <= last:
            return stack
    return None


def choose():
    """Makes this process use the stack of its Python, before TensorFlow loads.

    Raises:
        ImportError: other versions, or TensorFlow was imported before with
            another Keras.
    """
    python = sys.version_info[:2]
    stack = of_python(python)
    keras = stack.keras if stack else "keras"
    check_versions(python, _tensorflow(), _installed(keras))
    _choose_keras(stack)


def check_versions(python, tensorflow, keras):
    """Raises ImportError unless these versions are known to work together.

    Args:
        python: tuple of int, (major, minor).
        tensorflow: version string, or None where it is not installed.
        keras: likewise, of the distribution that the stack of this Python
            names.
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
        "BUILD.md says how to set it up."
    )


def versions():
    """Versions in use: dictionary of strings, without importing TensorFlow."""
    stack = of_python(sys.version_info[:2])
    return {
        "clsa_tf": sys.modules["clsa_tf"].__version__,
        "tensorflow": _tensorflow(),
        "keras": _installed(stack.keras),
        "python": platform.python_version(),
    }


def describe():
    """What `--version` prints: the `versions`, one a line."""
    return "\n".join(
        f"{name} {version}" for name, version in versions().items()
    )


def _choose_keras(stack):
    if stack.keras == "keras":
        # TensorFlow 2.15 would look for tf-keras; its own Keras is Keras 2.
        os.environ.pop(_LEGACY, None)
    else:
        value = os.environ.setdefault(_LEGACY, "1")
        if value not in ("1", "true", "True"):  # as TensorFlow compares
            raise ImportError(
                f"Expected {_LEGACY}=1 in the environment, received {value!r}, "
                "with which tf.keras is Keras 3; set it to 1 or unset it."
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
            f"{found.origin if found else 'none'}: TensorFlow was imported "
            "before clsa_tf; import clsa_tf first."
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
