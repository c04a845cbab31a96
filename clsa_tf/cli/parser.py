"""Parses the arguments of a command.

`clsa_tf.cli.flagfiles` expands flagfiles. The parsers of path flags
(`clsa_tf.options.flags`) expand `~`. Every error is a `FlagError` with a
message of one sentence.
"""

import difflib
import re

from absl import flags

from clsa_tf.cli import flagfiles
from clsa_tf.errors import UserError
from clsa_tf.options.flags import Flag, Written, is_required, spell

# Name of a flag in other programs -> names here. The first one that a command
# has is suggested.
_ALIASES = {
    "arch": ("backbone",),
    "architecture": ("backbone",),
    "amp": ("precision",),
    "backbone_name": ("backbone",),
    "batch": ("batch_size",),
    "bs": ("batch_size",),
    "checkpoint": ("workdir", "model_base_path", "encoder"),
    "checkpoint_dir": ("workdir",),
    "config": ("flagfile",),
    "crop_size": ("image_size",),
    "data": ("dataset", "images"),
    "data_path": ("dataset", "images"),
    "dataset_dir": ("dataset", "images"),
    "device": ("strategy", "accelerator"),
    "dir": ("workdir",),
    "dtype": ("precision",),
    "epochs": ("total_epochs",),
    "folder": ("dataset", "images"),
    "fp16": ("precision",),
    "gpus": ("strategy",),
    "image_dir": ("dataset", "images"),
    "img_size": ("image_size",),
    "input": ("dataset", "images"),
    "learning_rate": ("base_lr",),
    "log_dir": ("workdir",),
    "logdir": ("workdir",),
    "lr": ("base_lr",),
    "model": ("backbone", "encoder", "model_base_path", "workdir"),
    "model_dir": ("model_base_path", "encoder", "workdir"),
    "momentum": ("sgd_momentum",),
    "name": ("workdir", "model_name", "model"),
    "num_epochs": ("total_epochs",),
    "out": ("output", "workdir"),
    "out_dir": ("output", "workdir"),
    "output": ("workdir",),
    "output_dir": ("output", "workdir"),
    "photos": ("images", "dataset"),
    "queue": ("queue_size",),
    "recipe": ("flagfile",),
    "resolution": ("image_size",),
    "resume": ("workdir",),
    "save_dir": ("workdir",),
    "scheduler": ("lr_schedule",),
    "size": ("image_size",),
    "tau": ("temperature",),
    "wd": ("l2",),
    "weight_decay": ("l2",),
}


class FlagError(UserError):
    """A flag is unknown, missing, or has an invalid value."""


def parse(arguments, flag_values, *, known=None, positional=False):
    """Parses the arguments of a command.

    Args:
        arguments: list of str, without the name of the program.
        flag_values: the `absl.flags.FlagValues` to set.
        known: names of the flags to suggest; None: all of `flag_values`.
        positional: whether positional arguments are allowed.

    Returns:
        list of the positional arguments.

    Raises:
        FlagError: a flag is unknown, missing or invalid, or there is an
            unexpected positional argument.
        UserError: see `flagfiles.expand`.
    """
    expanded = flagfiles.expand(arguments)
    known = [*(list(flag_values) if known is None else known), "flagfile"]
    _record_origins(expanded, flag_values)
    try:
        rest = flag_values(["", *(a.text for a in expanded)])[1:]
    except flags.UnrecognizedFlagError as e:
        raise FlagError(_unknown_flag(e.flagname, known, expanded)) from e
    except flags.IllegalFlagValueError as e:
        raise FlagError(_invalid_value(str(e), flag_values)) from e
    except (flags.Error, ValueError) as e:
        raise FlagError(f"{str(e).rstrip('.')}; correct the command.") from e
    if rest and not positional:
        raise FlagError(
            f"Expected only flags, received {rest[0]!r}; write flags as "
            "--name=value."
        )
    missing = [
        f"--{name}"
        for name in known
        if name in flag_values
        and is_required(flag_values[name])
        and flag_values[name].value is None
    ]
    if missing:
        raise FlagError(
            f"Expected {' and '.join(missing)}, received none; add "
            f"{'it' if len(missing) == 1 else 'them'} (see `--help`)."
        )
    return rest


def suggest(name, known):
    """Suggests flags for an unknown name.

    Args:
        name: the unknown name, without dashes.
        known: list of the names of flags.

    Returns:
        list of at most two of `known`.
    """
    name = name.lower().replace("-", "_")
    for alias in _ALIASES.get(name, ()):
        if alias in known:
            return [alias]
    # For example --milestones is part of --lr_milestones.
    containing = [other for other in known if len(name) > 3 and name in other]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    return near or containing[:2]


def did_you_mean(name, known):
    """The `suggest`ed flags as a question that ends in a space; or ""."""
    found = " or ".join(f"--{other}" for other in suggest(name, known))
    return f"did you mean {found}? " if found else ""


def _record_origins(expanded, flag_values):
    """Records in each `Flag` where it is set, see `Flag.written`."""
    for flag in map(flag_values.__getitem__, flag_values):
        if isinstance(flag, Flag):
            flag.written = []
    for position, (text, files) in enumerate(expanded):
        name, equals, value = text.lstrip("-").partition("=")
        if not text.startswith("-"):
            continue
        off = name not in flag_values and name.startswith("no")
        name = name.removeprefix("no") if off else name
        if name not in flag_values or not isinstance(flag_values[name], Flag):
            continue
        if flag_values[name].boolean and not equals:
            value = "false" if off else "true"
        elif not equals and position + 1 < len(expanded):
            value = expanded[position + 1].text
        flag_values[name].written.append(Written(position, value, files))


def _unknown_flag(name, known, expanded):
    """Message for an unknown flag."""
    where = ""
    for text, files in expanded:
        if text.lstrip("-").partition("=")[0] == name and files:
            where = f" in {files[-1]}"
    question = did_you_mean(name, known)
    return (
        f"Expected a flag of this command, received --{name}{where}; "
        f"{question}`--help` lists all flags."
    )


def _invalid_value(message, flag_values):
    """Rewrites absl's message for an invalid value as Expected, received."""
    match = re.fullmatch(r"flag --(\w+)=(.*?): (.*)", message, re.DOTALL)
    if not match:
        return message
    name, value, problem = match.groups()
    flag = flag_values[name]
    if isinstance(flag, Flag):
        where = f" in {flag.files[-1]}" if flag.files else ""
        return f"{problem} for --{name}{where}; change the value."
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        expected = f"one of {', '.join(choices)}"
    elif flag.boolean:
        expected = "true or false"
    elif flag.flag_type() in ("int", "float"):
        expected = flag.parser.syntactic_help
    else:  # from a validator, whose message is the expected form
        expected = problem
        value = spell(flag.value)
    return (
        f"Expected {expected}, received {value!r} for --{name}; change the "
        "value."
    )
