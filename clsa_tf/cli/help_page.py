"""Renders `--help`: the command's description, and its flags in groups."""

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
# Type of a flag -> placeholder of its value.
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
_FLAGFILE = "file of flags, one per line. Flags after it override it"
_RECIPES = ". Recipes are found by name, such as clsa or cifar10/byol"


def asked(arguments):
    """Whether the arguments ask for help."""
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    return any(argument in _ASKS for argument in arguments)


def render(text, flag_values, arguments=(), width=None):
    """Renders the help of a command.

    Args:
        text: description of the command: the docstring of its module.
        flag_values: `absl.flags.FlagValues` with only this command's flags.
        arguments: list of str, the arguments of the command. They determine the
            `--method` whose options are shown.
        width: columns; None: width of the terminal, or 80 without one.

    Returns:
        str, without a newline at the end.

    Raises:
        UserError: the method does not exist, or see `flagfiles.expand`.
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
            # Required flags come first.
            rows = sorted(rows, key=lambda row: "(required" not in row[1])
            recipes = _RECIPES if method else ""
            rows.append(("--flagfile=FILE", _FLAGFILE + recipes))
            rows.append(("--help", "print this help and exit"))
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
        f"The flags below are those of --method={method}. Other methods have "
        f"other flags and defaults: --help --method={'|'.join(others)}.",
        width,
        break_on_hyphens=False,
    )


def _method(flag_values, arguments):
    """Returns the method whose options are shown, and the other methods."""
    if "method" not in flag_values or not isinstance(
        flag_values["method"], Flag
    ):
        return "", []
    flag = flag_values["method"]
    names = choices_of(flag.field)
    chosen = flag.default
    words = [text for text, _ in flagfiles.expand(list(arguments))]
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, value = word.lstrip("-").partition("=")
        if name == "method":
            chosen = value if equals else following
    problem = flag.field.metadata["check"](chosen)
    if problem:
        raise UserError(f"{problem} for --method; use one of these.")
    return chosen, [name for name in names if name != chosen]


def _row(flag, field):
    """Returns the name column and the text column of a flag.

    Args:
        flag: `absl.flags.Flag`.
        field: field of the configuration that provides help text and default;
            None: the flag provides them.
    """
    choices = getattr(flag.parser, "enum_values", None)
    if field:
        choices = choices_of(field)
    several = isinstance(flag.default, tuple)
    value = _VALUES.get(flag.flag_type(), "TEXT")
    if choices and not several:
        value = f"{{{','.join(choices)}}}"
    words = (field.metadata["help"] if field else flag.help).rstrip(".")
    words = re.sub(r"^<.*?>: ", "", words)  # absl adds the choices here
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
    """Lines of a flag: its name, and its text beside or below the name."""
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
    # Long lists of choices break after a comma.
    names = textwrap.wrap(
        start.replace(",", ", "),
        width,
        subsequent_indent=" " * 6,
        drop_whitespace=True,
        break_on_hyphens=False,
    )
    return [part.replace(", ", ",") for part in names] + lines
