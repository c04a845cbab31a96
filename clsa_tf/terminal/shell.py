"""Formats commands for messages, so that they can be copied to a shell."""

import os
import shlex
import sys


def of_module(module, **flags):
    """Formats a command that starts a module of this package.

    Args:
        module: name of the module, such as "clsa_tf.report".
        **flags: values of its flags. A flag with value None is omitted.

    Returns:
        str, quoted for a shell.
    """
    words = [f"--{k}={v}" for k, v in flags.items() if v is not None]
    return shlex.join([_python(), "-m", module, *words])


def arguments(module, words):
    """Formats a module's command with other arguments.

    Args:
        module: name of the module, such as "clsa_tf.train".
        words: list of its arguments.

    Returns:
        str, quoted for a shell: the whole command if this process runs that
        module, otherwise (such as in a user's program) the arguments only.
    """
    if _module() == module:
        words = [_python(), "-m", module, *words]
    return shlex.join(words)


def this():
    """Formats the command that started this process."""
    module = _module()
    if module:
        return shlex.join([_python(), "-m", module, *sys.argv[1:]])
    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def _python():
    """The Python executable as it was typed, or "python" if unknown."""
    typed = getattr(sys, "orig_argv", [])  # not in Python 3.9
    return typed[0] if typed and _module() else "python"


def _module():
    """Name of this package's module that Python runs as a command, or None."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    ours = spec and spec.name.startswith(("clsa_tf.", "export."))
    return spec.name if ours else None
