"""Error messages for flags of another method than the chosen one.

The usual cause is a recipe followed by another `--method=`. The message then
names all flags that have to change, and a command that works.
"""

import math
import os

from clsa_tf.cli import flagfiles
from clsa_tf.options.flags import Flag, spell
from clsa_tf.terminal import shell

_COMMAND = "clsa_tf.train"


def rejected_flags(flag_values, foreign):
    """Message: which flags the method lacks, their methods, and a remedy.

    Args:
        flag_values: the parsed flags.
        foreign: list of the set `Flag`s that the method lacks.
    """
    method = flag_values["method"]
    typed = [flag for flag in foreign if not flag.files]
    read = [flag for flag in foreign if flag.files]
    # (The first of its files is the one on the command line.)
    if read and method.files and method.files[0] != read[0].files[0]:
        names = ", ".join(f"--{flag.name}" for flag in read)
        return (
            f"Expected flagfiles of one method, received {method.files[0]} "
            f"with --method={method.value} after {read[0].files[0]} with "
            f"{names}; use one of the two."
        )
    if read and method.written and not method.files:
        return _rejected_recipe(flag_values, read, typed)
    flag, *others = typed or foreign
    chosen = f" of {method.files[-1]}" if method.files else ""
    more = f" and {len(others)} more" if others else ""
    return (
        f"Expected flags of --method={method.value}{chosen}, received "
        f"--{flag.name}{more}, a flag of {' and '.join(flag.owners)}; remove "
        "it or change --method."
    )


def _rejected_recipe(flag_values, read, typed):
    """Message: the command line sets another method than the recipe.

    Args:
        flag_values: the parsed flags.
        read: list of `Flag`s of other methods, set by a flagfile.
        typed: list of `Flag`s of other methods, set on the command line.
    """
    method, file = flag_values["method"], read[0].files[-1]
    before = [w.value for w in method.written if w.files]
    names = ", ".join(f"--{flag.name}" for flag in read)
    recipe = recipe_for(flag_values, like=file)
    instead = ""
    if recipe:
        arguments = [
            f"--flagfile={recipe}",
            *_flags_to_keep(flag_values, recipe),
        ]
        instead = f"use `{shell.arguments(_COMMAND, arguments)}`"
        if typed:
            left = ", ".join(f"--{flag.name}" for flag in typed)
            instead += f" (without {left}, not a flag of {method.value})"
        instead += ", or "
    return (
        f"Expected a flagfile for --method={method.value}, received {file} for "
        f"{before[-1] if before else 'another method'}, with {names}; "
        f"{instead}remove these lines from a copy of {file}."
    )


def recipe_for(flag_values, like):
    """Finds the recipe of the chosen method that is most like a flagfile.

    Args:
        flag_values: the parsed flags, including `--method`.
        like: path of the flagfile. Recipes with the same image size are
            preferred, then recipes in the same folder, then the recipe with the
            name of the method.

    Returns:
        the name for `--flagfile=`; "" if the method has no recipe.
    """
    method, usual = flag_values["method"].value, flag_values["image_size"]

    def image_size(values):
        return int(values.get("image_size", usual.default))

    def distance(name):
        place = str(known[name].resolve().parent)
        return (
            abs(math.log(image_size(found[name]) / size)),
            place != folder,
            "/" in name,
            name.rpartition("/")[2] != method,
        )

    size = image_size(flagfiles.values_of(like))
    folder = os.path.dirname(os.path.realpath(like))
    known = flagfiles.recipes()
    found = {name: flagfiles.values_of(path) for name, path in known.items()}
    names = [name for name in found if found[name].get("method") == method]
    return min(names, key=distance) + flagfiles.SUFFIX if names else ""


def _flags_to_keep(flag_values, recipe):
    """Flags to repeat after another recipe: data and command-line flags.

    Args:
        flag_values: the parsed flags.
        recipe: name of the other recipe.

    Returns:
        list of arguments.
    """
    there, method = flagfiles.values_of(recipe), flag_values["method"].value

    def stays(flag):
        if flag.name == "method" or flag.owners and method not in flag.owners:
            return False
        if not flag.files:
            return True
        # From the flagfile only the flags that describe the data.
        data = flag.field.metadata["group"] == "data"
        return data and spell(flag.value) != there.get(flag.name)

    flags = [flag_values[name] for name in flag_values]
    return [
        f"--{flag.name}={spell(flag.value)}"
        for flag in flags
        if isinstance(flag, Flag) and flag.written and stays(flag)
    ]
