"""What is said of flags that belong to another method than the chosen one.

Mostly of a recipe and another `--method=` behind it: then all flags that would
have to change are named at once, with a command that works.
"""

import math
import os

from clsa_tf.cli import flagfiles
from clsa_tf.options.flags import Flag, spell
from clsa_tf.terminal import shell

_COMMAND = "clsa_tf.train"


def rejected_flags(flag_values, foreign):
    """Says which flags are not of the method, whose they are and what to do.

    Args:
        flag_values: the parsed flags.
        foreign: list of `Flag`: those of other methods only that were set.
    """
    method = flag_values["method"]
    typed = [flag for flag in foreign if not flag.files]
    # (The first of its files is the one that was typed.)
    read = [flag for flag in foreign if flag.files]
    if read and method.files and method.files[0] != read[0].files[0]:
        names = ", ".join(f"--{flag.name}" for flag in read)
        return (
            f"Expected one flagfile, received {method.files[0]} with "
            f"--method={method.value} behind {read[0].files[0]} with "
            f"{names}; take one of the two."
        )
    if read and method.written and not method.files:
        return _rejected_recipe(flag_values, read, typed)
    flag, *others = typed or foreign
    chosen = f" of {method.files[-1]}" if method.files else ""
    more = f" and {len(others)} more" if others else ""
    return (
        f"Expected flags of --method={method.value}{chosen}, received "
        f"--{flag.name}{more}, which belongs to "
        f"{' and '.join(flag.owners)}; remove it or change --method."
    )


def _rejected_recipe(flag_values, read, typed):
    """A recipe's flags against a typed method.

    Args:
        flag_values: the parsed flags.
        read: list of `Flag`: those of other methods, from a flagfile.
        typed: list of `Flag`: those of other methods that were typed.
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
        instead = f"write `{shell.arguments(_COMMAND, arguments)}`"
        if typed:
            left = ", ".join(f"--{flag.name}" for flag in typed)
            instead += f" (without {left}, which {method.value} has not)"
        instead += ", or "
    return (
        f"Expected a flagfile for --method={method.value}, which was typed, "
        f"received {file} for {before[-1] if before else 'another method'}, "
        f"with {names}; {instead}take these lines out of a copy of {file}."
    )


def recipe_for(flag_values, like):
    """Name, for `--flagfile=`, of the recipe nearest to another one.

    Args:
        flag_values: the parsed flags, which say the method.
        like: path of the other flagfile. A recipe for images of its size is
            preferred, then one from its folder, then one that is called like
            the method.

    Returns:
        the name; "" if there is no recipe of that method.
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
    """What has to stand behind another recipe: the data, and what was typed.

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
        # The images, and whatever is said about them.
        data = flag.field.metadata["group"] == "data"
        return data and spell(flag.value) != there.get(flag.name)

    flags = [flag_values[name] for name in flag_values]
    return [
        f"--{flag.name}={spell(flag.value)}"
        for flag in flags
        if isinstance(flag, Flag) and flag.written and stays(flag)
    ]
