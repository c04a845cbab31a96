"""clsa_tf: pretraining of image encoders without labels, in TensorFlow."""

import importlib
import typing

from clsa_tf import console, stack

if typing.TYPE_CHECKING:
    from clsa_tf.load import image_size as image_size
    from clsa_tf.load import load_encoder as load_encoder
    from clsa_tf.pretraining import pretrain as pretrain

__version__ = "0.1.0"

stack.choose()

# A program of somebody else keeps its log and its signals as they are.
if console.is_command():
    console.begin()

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
