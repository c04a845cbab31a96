"""The methods: one file each, found by name.

A method's module defines `Options` (a frozen dataclass of `option`s, which
become flags), `check(config)` and `METHOD` (a subclass of `base.Method`).
Modules in this package are found by their file names; `register` adds others.
"""

import importlib
import pkgutil

# What methods are made of.
_PARTS = ("base", "gradients", "key_queue", "momentum", "statistics")
# Name -> module to import.
METHODS = {
    found.name: f"{__name__}.{found.name}"
    for found in sorted(pkgutil.iter_modules(__path__))
    if found.name not in _PARTS
}


def names():
    """Names of all methods, sorted."""
    return tuple(sorted(METHODS))


def load(name):
    """Returns the module of the method called `name`, one of `names`."""
    return importlib.import_module(METHODS[name])


def register(name, module):
    """Adds a method that is defined outside this package.

    Args:
        name: for `--method`.
        module: full name of its module, such as `"my_project.my_method"`.
    """
    METHODS[name] = module
