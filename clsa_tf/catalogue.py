"""The methods in words: `python -m clsa_tf.train --list_methods`."""

import contextlib
import glob
import inspect
import os

import absl.flags

from clsa_tf import config as config_lib
from clsa_tf import methods
from clsa_tf.errors import UserError


def describe(folder="configs"):
    """Returns one line for each method.

    Args:
        folder: of flagfiles; they are named with the method they are of.
    """
    files = _flagfiles(folder)
    width = max(map(len, methods.NAMES))
    lines = []
    for name in methods.NAMES:
        # The first line, as it stands at the top of the file.
        sentence = inspect.getdoc(methods.load(name)).splitlines()[0]
        line = f"{name:<{width}}  {sentence.rstrip('.')}"
        if name in files:
            stems = ",".join(files[name])
            stems = f"{{{stems}}}" if len(files[name]) > 1 else stems
            line += f"  ({folder}/{stems}.flags)"
        lines.append(line)
    return "\n".join(lines)


def _flagfiles(folder):
    """Method -> names, without suffix, of the flagfiles that use it."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.flags"))):
        # Those of another program are none of our business.
        with contextlib.suppress(absl.flags.Error, UserError):
            config = config_lib.parse([f"--flagfile={path}"])
            stem = os.path.splitext(os.path.basename(path))[0]
            found.setdefault(config.method, []).append(stem)
    return found
