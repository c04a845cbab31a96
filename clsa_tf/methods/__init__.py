"""The methods, one file each.

The module of a method defines `Options` (a frozen dataclass of `option`s, which
become flags), `check(config)` and `METHOD` (a subclass of `base.Method`). The
name of a method is the name of its file in this package. `register` adds
methods from elsewhere.
"""

import importlib
import pkgutil

# Modules of this package that are not methods.
_NOT_METHODS = (
    "base",
    "gradients",
    "key_queue",
    "momentum",
    "statistics",
    "symmetric",
)
# Name of each method -> full name of its module.
METHODS = {
    found.name: f"{__name__}.{found.name}"
    for found in sorted(pkgutil.iter_modules(__path__))
    if found.name not in _NOT_METHODS
}


def names():
    """Names of all methods, sorted."""
    return tuple(sorted(METHODS))


def load(name):
    """Returns the module of the method called `name`, one of `names`."""
    return importlib.import_module(METHODS[name])


def class_of(config):
    """Returns the class that trains a method with its options.

    Args:
        config: `clsa_tf.config.Config`.
    """
    return load(config.method).METHOD.variant(config.options)


def register(name, module):
    """Adds a method that is defined outside this package.

    Args:
        name: value of `--method` that selects it.
        module: full name of its module, such as `"my_project.my_method"`.
    """
    METHODS[name] = module
