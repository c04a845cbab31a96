"""clsa_tf: pretraining of image encoders without labels, in TensorFlow."""

import importlib
import importlib.metadata
import sys
import typing

if typing.TYPE_CHECKING:
    from clsa_tf.load import image_size as image_size
    from clsa_tf.load import load_encoder as load_encoder
    from clsa_tf.pretraining import pretrain as pretrain

__version__ = "0.1.0"

_NEEDS = "clsa_tf needs Python 3.9 to 3.11 and TensorFlow 2.15 with Keras 2.15"


def _check_versions(python, tensorflow, keras):
    """Raises ImportError unless these versions are known to work together.

    Args:
        python: tuple of int, (major, minor).
        tensorflow: version string, or None where it is not installed.
        keras: likewise.
    """
    received = (
        f"Python {'.'.join(map(str, python))}, "
        f"TensorFlow {tensorflow or 'not installed'}, "
        f"Keras {keras or 'not installed'}"
    )
    if (3, 9) <= python <= (3, 11) and all(
        version and version.startswith("2.15.")
        for version in (tensorflow, keras)
    ):
        return
    raise ImportError(
        f"{_NEEDS}; received {received}. See BUILD.md for how to set it up."
    )


def _installed(*names):
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


_check_versions(
    sys.version_info[:2],
    _installed("tensorflow", "tensorflow-cpu", "tensorflow-macos"),
    _installed("keras"),
)


# TensorFlow takes seconds to import: only for those who need it.
_LAZY = {
    "image_size": "clsa_tf.load",
    "load_encoder": "clsa_tf.load",
    "pretrain": "clsa_tf.pretraining",
}


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
