"""The methods in words: `python -m clsa_tf.train --list_methods`."""

import inspect

from clsa_tf import flagfiles, methods


def describe():
    """Returns one line for each method, with its recipes for `--flagfile=`."""
    recipes = {}
    for name, path in flagfiles.recipes().items():
        method = flagfiles.values_of(path).get("method")
        recipes.setdefault(method, []).append(name)
    width = max(map(len, methods.NAMES))
    lines = []
    for name in methods.NAMES:
        # The first line, as it stands at the top of the file.
        sentence = inspect.getdoc(methods.load(name)).splitlines()[0]
        line = f"{name:<{width}}  {sentence.rstrip('.')}"
        if name in recipes:
            line += f"  (--flagfile={'|'.join(recipes[name])})"
        lines.append(line)
    return "\n".join(lines)
