"""Files of flags: found by name, read with what they include.

`expand` replaces every `--flagfile=` by the lines of that file and notes for
each flag which file it stands in, so that an error can say where a value came
from, and so that a recipe's values can be told from those that were typed.
"""

import difflib
import os
import pathlib
import typing

from clsa_tf.errors import UserError

SUFFIX = ".flags"
_PACKAGE = pathlib.Path(__file__).parents[1]
# Of an installed package; of a checkout.
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
# How the README names recipes, wherever the package is installed.
_FOLDER = "configs/"


class Argument(typing.NamedTuple):
    """One argument of a command.

    Attributes:
        text: such as `"--total_epochs=30"`.
        files: paths of the flagfile that it stands in, after those that
            include it; () if it was typed.
    """

    text: str
    files: tuple = ()


def expand(arguments):
    """Replaces each `--flagfile=` by what the file holds.

    Args:
        arguments: list of str, without the name of the program.

    Returns:
        list of `Argument`, without `--flagfile`.

    Raises:
        UserError: there is no such file, it is no text, or includes itself.
    """
    found, rest = [], list(arguments)
    while rest:
        text = rest.pop(0)
        name = None
        if text in ("--flagfile", "-flagfile"):
            if not rest:
                raise UserError(
                    "Expected --flagfile=FILE, received --flagfile without a "
                    "file; name one."
                )
            name = rest.pop(0)
        elif text.startswith(("--flagfile=", "-flagfile=")):
            name = text.partition("=")[2]
        if name is not None:
            found += _read(name, ())
            continue
        found.append(Argument(text))
        if text == "--":  # what follows is no flag
            return found + [Argument(other) for other in rest]
    return found


def recipes():
    """The recipes that come with the package.

    Returns:
        dictionary: name, such as `"clsa"` or `"cifar10/byol"`, -> its
        `pathlib.Path`.
    """
    for place in _PLACES:
        if (place / f"clsa{SUFFIX}").exists():
            found = {
                path.relative_to(place).with_suffix("").as_posix(): path
                for path in place.rglob(f"*{SUFFIX}")
            }
            # Those of folders last.
            return dict(sorted(found.items(), key=lambda x: ("/" in x[0], x)))
    return {}


def values_of(path):
    """The flags of a flagfile.

    Args:
        path: a path or the name of a recipe.

    Returns:
        dictionary: name -> value as it is spelled, the last one.
    """
    found = {}
    for text, _ in expand([f"--flagfile={path}"]):
        name, _, value = text.lstrip("-").partition("=")
        found[name] = value
    return found


def _read(name, including):
    """The `Argument`s of the flagfile called `name`."""
    name = os.path.expanduser(name.strip())
    if not name:
        return []
    path = _find(name, including)
    if path in including:
        raise UserError(
            f"Expected flagfiles that do not include themselves, received "
            f"{path}, included by {including[-1]}; remove one --flagfile."
        )
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"Expected a text file of flags, received {path} ("
            f"{getattr(e, 'strerror', None) or 'no text'}); choose another."
        ) from e
    found, files = [], (*including, path)
    for line in map(str.strip, lines):
        if line.startswith(("--flagfile=", "-flagfile=")):
            found += _read(line.partition("=")[2], files)
        elif line and not line.startswith(("#", "//")):
            found.append(Argument(line, files))
    return found


def _find(name, including):
    """The path of the flagfile called `name`.

    Looked for as it is written, beside the file that includes it, and among
    the recipes; with and without suffix.
    """
    if os.path.exists(name) and not os.path.isdir(name):
        return name  # maybe a pipe
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
    # (Some are only parts of recipes.)
    known = [n for n, path in known.items() if "method" in values_of(path)]
    near = difflib.get_close_matches(stem, known, n=1)
    asked = f"did you mean {near[0]}? " if near else ""
    run = os.path.join(name, "run.flags")
    if os.path.isfile(run):
        asked = f"did you mean {run}? "
    raise UserError(
        f"Expected a file of flags, received --flagfile={name}, which is none; "
        f"{asked}check the path, or name one of the recipes "
        f"{', '.join(known) or '(none are installed)'}."
    )
