"""The methods: one file each, found by name.

A method's file defines `Options` (a frozen dataclass of `option`s, which become
flags), `check(config)` and `METHOD` (a subclass of `base.Method`).
"""

import importlib
import pkgutil

# What methods are made of.
_PARTS = ("base", "gradients", "key_queue", "momentum", "statistics")
NAMES = tuple(
    sorted(
        m.name for m in pkgutil.iter_modules(__path__) if m.name not in _PARTS
    )
)


def load(name):
    """Returns the module of the method called `name`, one of `NAMES`."""
    return importlib.import_module(f"{__name__}.{name}")
