"""Text of `python -m clsa_tf.train --list_methods`."""

import inspect
import textwrap

from clsa_tf import methods
from clsa_tf.cli import flagfiles

_WIDTH = 80  # columns


def describe():
    """Describes each method in one sentence, followed by its recipes."""
    recipes = {}
    for name, path in flagfiles.recipes().items():
        method = flagfiles.values_of(path).get("method")
        recipes.setdefault(method, []).append(name)
    indent = max(map(len, methods.names())) + 2
    lines = []
    for name in methods.names():
        # The first line of the module's docstring.
        sentence = inspect.getdoc(methods.load(name)).splitlines()[0]
        lines += textwrap.wrap(
            f"{name:<{indent}}{sentence.rstrip('.')}",
            _WIDTH,
            subsequent_indent=" " * indent,
        )
        lines += textwrap.wrap(
            f"--flagfile= {', '.join(recipes.get(name, ['(none)']))}",
            _WIDTH,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + len("--flagfile= ")),
        )
    return "\n".join(lines)
