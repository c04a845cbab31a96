"""From arguments to parsed flags: the one place where both meet.

Flagfiles are expanded (`clsa_tf.cli.flagfiles`), `~` is replaced by the parsers
of the flags that are paths (`clsa_tf.options.flags`), and whatever is wrong is
a `FlagError` of one sentence.
"""

import difflib
import re

from absl import flags

from clsa_tf.cli import flagfiles
from clsa_tf.errors import UserError
from clsa_tf.options.flags import Flag, Written, is_required, spell

# How other programs call it -> how it is called here; the first that a command
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
    """A flag that does not exist, lacks, or has a value that it cannot have."""


def parse(arguments, flag_values, *, known=None, positional=False):
    """Parses the arguments of a command.

    Args:
        arguments: list of str, without the name of the program.
        flag_values: the `absl.flags.FlagValues` to set.
        known: names of the flags to suggest; None: all of `flag_values`.
        positional: whether there may be other arguments than flags.

    Returns:
        list of those other arguments.

    Raises:
        FlagError: a flag is unknown, missing or ill-typed, or something is no
            flag.
        UserError: see `flagfiles.expand`.
    """
    expanded = flagfiles.expand(arguments)
    known = [*(list(flag_values) if known is None else known), "flagfile"]
    _note(expanded, flag_values)
    try:
        rest = flag_values(["", *(a.text for a in expanded)])[1:]
    except flags.UnrecognizedFlagError as e:
        raise FlagError(_unknown(e.flagname, known, expanded)) from e
    except flags.IllegalFlagValueError as e:
        raise FlagError(_illegal(str(e), flag_values)) from e
    except (flags.Error, ValueError) as e:
        raise FlagError(f"{str(e).rstrip('.')}; correct it.") from e
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
            f"Expected {' and '.join(missing)}, received none; give "
            f"{'it' if len(missing) == 1 else 'them'}, as `--help` explains."
        )
    return rest


def suggest(name, known):
    """Names of flags that somebody who wrote `name` may have meant.

    Args:
        name: without dashes.
        known: list of names.

    Returns:
        list of at most two of `known`.
    """
    name = name.lower().replace("-", "_")
    for usual in _ALIASES.get(name, ()):
        if usual in known:
            return [usual]
    # --nodownloads, --milestones
    holding = [other for other in known if len(name) > 3 and name in other]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    return near or holding[:2]


def did_you_mean(name, known):
    """A question about `suggest`ed flags, ending in a space; or ""."""
    found = " or ".join(f"--{other}" for other in suggest(name, known))
    return f"did you mean {found}? " if found else ""


def _note(expanded, flag_values):
    """Notes in our flags where they were set."""
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


def _unknown(name, known, expanded):
    where = ""
    for text, files in expanded:
        if text.lstrip("-").partition("=")[0] == name and files:
            where = f" in {files[-1]}"
    question = did_you_mean(name, known)
    return (
        f"Expected a flag of this command, received --{name}{where}; "
        f"{question}`--help` lists them."
    )


def _illegal(message, flag_values):
    """Says in our words what absl says of a flag's value."""
    match = re.fullmatch(r"flag --(\w+)=(.*?): (.*)", message, re.DOTALL)
    if not match:
        return message
    name, value, problem = match.groups()
    flag = flag_values[name]
    if isinstance(flag, Flag):
        where = f" in {flag.files[-1]}" if flag.files else ""
        return f"{problem} for --{name}{where}; correct it."
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        expected = f"one of {', '.join(choices)}"
    elif flag.boolean:
        expected = "true or false"
    elif flag.flag_type() in ("int", "float"):
        expected = flag.parser.syntactic_help
    else:  # by a validator, whose words say what is expected
        expected = problem
        value = spell(flag.value)
    return f"Expected {expected}, received {value!r} for --{name}; correct it."
