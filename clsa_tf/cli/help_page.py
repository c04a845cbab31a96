"""The text of `--help`: what a command does, and its flags in groups."""

import inspect
import re
import shutil
import textwrap

from clsa_tf.cli import flagfiles
from clsa_tf.errors import UserError
from clsa_tf.options.fields import GROUPS, choices_of
from clsa_tf.options.flags import Flag, is_required, spell

_ASKS = ("--help", "-help", "-h", "--helpfull", "--helpshort")
_COLUMN = 26
# Kind of a flag -> what stands for its value.
_VALUES = {
    "bool": "",
    "crop": "CROP",
    "crops": "CROPS",
    "float": "X",
    "floats": "X,...",
    "int": "N",
    "ints": "N,...",
    "path": "PATH",
    "strs": "A,...",
    "comma separated list of strings": "A,...",
}
_FLAGFILE = "read flags from a file, one per line; flags after it override it"
_RECIPES = "; recipes are found by name, such as clsa or cifar10/byol"


def asked(arguments):
    """Whether a command is asked for its help."""
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    return any(argument in _ASKS for argument in arguments)


def render(text, flag_values, arguments=(), width=None):
    """Returns the help of a command.

    Args:
        text: what the command does: docstring of its module.
        flag_values: `absl.flags.FlagValues` with its flags and no others.
        arguments: list of str that it was called with: they choose the
            `--method` whose options are shown.
        width: columns; None: the terminal's, 80 if there is none.

    Raises:
        UserError: there is no such method, or see `flagfiles.expand`.
    """
    width = width or min(shutil.get_terminal_size((80, 24)).columns, 100)
    method, others = _method(flag_values, arguments)
    sections = {}
    for name in flag_values:
        flag = flag_values[name]
        field = getattr(flag, "field", None)
        if getattr(flag, "owners", None):
            if method not in flag.owners:
                continue
            field = flag.owners[method]
        group = field.metadata["group"] if field else ""
        sections.setdefault(group, []).append(_row(flag, field))
    lines = inspect.cleandoc(text).splitlines()
    for group in ("", *GROUPS):
        rows = sections.get(group, [])
        if not group:
            # Those that nothing works without come first.
            rows = sorted(rows, key=lambda row: "(required" not in row[1])
            recipes = _RECIPES if method else ""
            rows.append(("--flagfile=FILE", _FLAGFILE + recipes))
            rows.append(("--help", "print this and exit"))
            if "version" not in flag_values:
                rows.append(("--version", "print the versions and exit"))
        if not rows:
            continue
        lines += ["", f"{GROUPS.get(group, 'Flags')}:"]
        for row in rows:
            lines += _wrap(*row, width)
        if not group and method:
            lines += ["", *_about_methods(method, others, width)]
    return "\n".join(lines)


def _about_methods(method, others, width):
    return textwrap.wrap(
        f"Below are the flags of --method={method}. Some flags and defaults of "
        f"other methods differ: --help --method={'|'.join(others)}.",
        width,
        break_on_hyphens=False,
    )


def _method(flag_values, arguments):
    """The method whose options are shown, and the names of the others."""
    if "method" not in flag_values or not isinstance(
        flag_values["method"], Flag
    ):
        return "", []
    flag = flag_values["method"]
    names = choices_of(flag.field)
    chosen = flag.default
    words = [text for text, _ in flagfiles.expand(list(arguments))]
    for word, following in zip(words, [*words[1:], ""]):
        name, told, value = word.lstrip("-").partition("=")
        if name == "method":
            chosen = value if told else following
    problem = flag.field.metadata["check"](chosen)
    if problem:
        raise UserError(f"{problem} for --method; choose one of these.")
    return chosen, [name for name in names if name != chosen]


def _row(flag, field):
    """How a flag is written, and what it is.

    Args:
        flag: `absl.flags.Flag`.
        field: of the configuration, whose default holds; None: the flag's.
    """
    choices = getattr(flag.parser, "enum_values", None)
    if field:
        choices = choices_of(field)
    several = isinstance(flag.default, tuple)
    value = _VALUES.get(flag.flag_type(), "TEXT")
    if choices and not several:
        value = f"{{{','.join(choices)}}}"
    words = (field.metadata["help"] if field else flag.help).rstrip(".")
    words = re.sub(r"^<.*?>: ", "", words)  # absl puts the choices there
    notes = []
    if choices and several:
        notes.append(f"of {', '.join(choices)}")
    if is_required(flag):
        notes.append("required")
    else:
        default = field.default if field else flag.default
        if default is not None:
            notes.append(f"default: {spell(default) or 'empty'}")
    notes = f" ({'; '.join(notes)})" if notes else ""
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={value}"
    return name, words + notes


def _wrap(name, words, width):
    """Lines of a flag: its name, and the words beside or below it."""
    indent = " " * _COLUMN
    lines = textwrap.wrap(
        words,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    start = f"  {name}"
    if len(start) <= _COLUMN - 2:
        lines[0] = start.ljust(_COLUMN) + lines[0].strip()
        return lines
    # Long choices are broken after a comma.
    names = textwrap.wrap(
        start.replace(",", ", "),
        width,
        subsequent_indent=" " * 6,
        drop_whitespace=True,
        break_on_hyphens=False,
    )
    return [part.replace(", ", ",") for part in names] + lines
