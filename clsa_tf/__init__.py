"""clsa_tf: pretraining of image encoders without labels, in TensorFlow."""

import importlib
import typing

from clsa_tf import stack
from clsa_tf.terminal import console

if typing.TYPE_CHECKING:
    from clsa_tf.api.load import image_size as image_size
    from clsa_tf.api.load import load_encoder as load_encoder
    from clsa_tf.api.pretrain import pretrain as pretrain

__version__ = "0.2.0"

stack.choose()

# Version 0.1.0 documented `from clsa_tf import console`, which still works.
quieten = console.quieten
share_gpus = console.share_gpus

# Only commands change log and signals, not programs that import the library.
if console.is_command():
    console.begin()

# Imported on first use, because TensorFlow takes seconds to import.
_LAZY = {
    "image_size": "clsa_tf.api.load",
    "load_encoder": "clsa_tf.api.load",
    "pretrain": "clsa_tf.api.pretrain",
}


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
