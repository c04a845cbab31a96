"""Flagfiles: finding them by name, and expanding them with their includes.

`expand` replaces every `--flagfile=` by the lines of that file and records the
file of each flag. Error messages can then name the file of a value, and values
of a recipe can be distinguished from those of the command line.
"""

import difflib
import os
import pathlib
import typing

from clsa_tf.errors import UserError

SUFFIX = ".flags"
_PACKAGE = pathlib.Path(__file__).parents[1]
# Directories of the recipes: in an installed package, in a checkout.
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
# Optional prefix of the names of recipes, as in the README.
_FOLDER = "configs/"


class Argument(typing.NamedTuple):
    """One argument of a command.

    Attributes:
        text: the argument, such as `"--total_epochs=30"`.
        files: paths of the including flagfiles and, last, of the flagfile that
            contains the argument; () for the command line.
    """

    text: str
    files: tuple = ()


def expand(arguments):
    """Replaces each `--flagfile=` by the contents of the file.

    Args:
        arguments: list of str, without the name of the program.

    Returns:
        list of `Argument`, without `--flagfile`.

    Raises:
        UserError: a file does not exist, is not a text file, or includes
            itself.
    """
    found, rest = [], list(arguments)
    while rest:
        text = rest.pop(0)
        name = None
        if text in ("--flagfile", "-flagfile"):
            if not rest:
                raise UserError(
                    "Expected --flagfile=FILE, received --flagfile without a "
                    "value; add the file."
                )
            name = rest.pop(0)
        elif text.startswith(("--flagfile=", "-flagfile=")):
            name = text.partition("=")[2]
        if name is not None:
            found += _read(name, ())
            continue
        found.append(Argument(text))
        if text == "--":  # no flags follow
            return found + [Argument(other) for other in rest]
    return found


def recipes():
    """Finds the recipes that come with the package.

    Returns:
        dict, name such as `"clsa"` or `"cifar10/byol"` -> `pathlib.Path`.
    """
    for place in _PLACES:
        if (place / f"clsa{SUFFIX}").exists():
            found = {
                path.relative_to(place).with_suffix("").as_posix(): path
                for path in place.rglob(f"*{SUFFIX}")
            }
            # Recipes in folders come last.
            return dict(sorted(found.items(), key=lambda x: ("/" in x[0], x)))
    return {}


def values_of(path):
    """Reads the flags of a flagfile.

    Args:
        path: a path or the name of a recipe.

    Returns:
        dict, name -> value as text. The last value of a flag counts.
    """
    found = {}
    for text, _ in expand([f"--flagfile={path}"]):
        name, _, value = text.lstrip("-").partition("=")
        found[name] = value
    return found


def _read(name, including):
    """Returns the `Argument`s of the flagfile called `name`."""
    name = os.path.expanduser(name.strip())
    if not name:
        return []
    path = _find(name, including)
    if path in including:
        raise UserError(
            f"Expected flagfiles without circular includes, received {path}, "
            f"included by {including[-1]}; remove that --flagfile line."
        )
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"Expected a readable text file of flags, received {path} ("
            f"{getattr(e, 'strerror', None) or 'not text'}); check the path."
        ) from e
    found, files = [], (*including, path)
    for line in map(str.strip, lines):
        if line.startswith(("--flagfile=", "-flagfile=")):
            found += _read(line.partition("=")[2], files)
        elif line and not line.startswith(("#", "//")):
            found.append(Argument(line, files))
    return found


def _find(name, including):
    """Finds the path of the flagfile called `name`.

    Searched, with and without suffix: the path itself, the directory of the
    including file, and the recipes.
    """
    if os.path.exists(name) and not os.path.isdir(name):
        return name  # may be a pipe
    names = [name, name + SUFFIX]
    places = [name + SUFFIX]
    if including:
        folder = os.path.dirname(including[-1])
        places += [os.path.join(folder, other) for other in names]
    for path in places:
        if os.path.isfile(path):
            return path
    known = recipes()
    stem = name.removeprefix(_FOLDER).removesuffix(SUFFIX)
    if stem in known:
        return str(known[stem])
    # Flagfiles without a method are only parts of recipes.
    known = [n for n, path in known.items() if "method" in values_of(path)]
    near = difflib.get_close_matches(stem, known, n=1)
    suggestion = f"did you mean {near[0]}? Otherwise " if near else ""
    run = os.path.join(name, "run.flags")
    if os.path.isfile(run):
        suggestion = f"did you mean {run}? Otherwise "
    raise UserError(
        f"Expected an existing flagfile, received --flagfile={name}; "
        f"{suggestion}check the path or use one of the recipes "
        f"{', '.join(known) or '(none are installed)'}."
    )
