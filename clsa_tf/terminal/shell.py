"""Commands as a person can copy them from what is printed."""

import os
import shlex
import sys


def of_module(module, **flags):
    """The command that starts one of our modules.

    Args:
        module: such as "clsa_tf.report".
        **flags: their values, of which None stands for a flag left out.

    Returns:
        string, quoted for a shell.
    """
    words = [f"--{k}={v}" for k, v in flags.items() if v is not None]
    return shlex.join([_python(), "-m", module, *words])


def arguments(module, words):
    """What a person types to start one of our modules with other arguments.

    Args:
        module: such as "clsa_tf.train".
        words: list of its arguments.

    Returns:
        string, quoted for a shell: the whole command, or only the arguments if
        this process is something else, such as a program of the person's own.
    """
    if _module() == module:
        words = [_python(), "-m", module, *words]
    return shlex.join(words)


def this():
    """The command that started this process."""
    module = _module()
    if module:
        return shlex.join([_python(), "-m", module, *sys.argv[1:]])
    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def _python():
    """Python as the person typed it, where that is known."""
    typed = getattr(sys, "orig_argv", [])  # not in Python 3.9
    return typed[0] if typed and _module() else "python"


def _module():
    """Name of the module of ours that Python was started with, or None."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    ours = spec and spec.name.startswith(("clsa_tf.", "export."))
    return spec.name if ours else None
