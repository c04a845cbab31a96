"""Converts flags and flagfiles to a `Config` and back; compares two of them.

`Config` is defined in `config_fields.py`. `to_flagfile` writes a configuration
in the format that `--flagfile` reads.
"""

import copy
import os
import re
import zlib

from absl import flags

import clsa_tf
from clsa_tf import methods, stack
from clsa_tf.cli import other_method, parser, recipe_length
from clsa_tf.config_fields import Config, flag_fields
from clsa_tf.data import service_client
from clsa_tf.errors import UserError
from clsa_tf.optimizers.schedule import check_schedule
from clsa_tf.options.fields import AUTO
from clsa_tf.options.flags import Flag, spell

# Name of the flagfile in a run's directory, which repeats the run.
RUN_FLAGS = "run.flags"
# Start of its first lines, one for each version that wrote it, newest first.
_HEADER = "# clsa_tf "
# Version 0.1.0 wrote no such line.
_NO_HEADER = "0.1.0 or earlier"


def default(method="clsa", **changes):
    """Returns the default configuration of `method`.

    Args:
        method: name of the method.
        **changes: fields or options with other values.
    """
    options = methods.load(method).Options()
    return Config(method=method, options=options).replace(**changes)


def default_of(name):
    """Returns the default of a field of `Config`, as text of a flag."""
    return spell(Config.__dataclass_fields__[name].default)


def define_flags(flag_values=flags.FLAGS):
    """Defines a flag for every field of `Config` and of all `Options`."""
    for field in flag_fields(Config):
        flags.DEFINE_flag(Flag(field), flag_values)
    for name, owned in _method_fields().items():
        if name not in flag_values:
            flag = Flag(_for_all(owned), owners=owned)
            flags.DEFINE_flag(flag, flag_values)


def from_flags(flag_values=flags.FLAGS):
    """Returns the `Config` of the parsed flags.

    A recipe's warm-up and milestones are scaled to `--total_epochs`, and a
    line about it is printed, see `clsa_tf.cli.recipe_length`.

    Raises:
        UserError: a flag of another method, or values that contradict each
            other.
    """
    method = flag_values["method"].value
    options = methods.load(method).Options
    mine = {f.name for f in flag_fields(options)}
    foreign = [
        flag_values[name]
        for name in _method_fields()
        if name not in mine and flag_values[name].present
    ]
    if foreign:
        raise UserError(other_method.rejected_flags(flag_values, foreign))
    # A flag that several methods share has one default per method. Only values
    # that were set override it.
    own = {n: flag_values[n].value for n in mine if flag_values[n].present}
    common = {f.name: flag_values[f.name].value for f in flag_fields(Config)}
    fitted, sentence = recipe_length.adapt(flag_values)
    config = Config(**common | fitted, options=options(**own))
    check(config)
    for line in (*_overridden(flag_values), sentence):
        if line:
            print(line)
    return config


def _overridden(flag_values):
    """Warns of flags whose values a later flagfile overrides.

    Args:
        flag_values: the parsed flags.

    Returns:
        list of sentences.
    """
    found = []
    for flag in map(flag_values.__getitem__, flag_values):
        written = getattr(flag, "written", ())
        typed = [w.value for w in written if not w.files]
        if typed and written[-1].files and typed[-1] != written[-1].value:
            found.append(
                f"warning: --{flag.name}={typed[-1]} has no effect, because "
                f"the later --flagfile={written[-1].files[0]} sets "
                f"{written[-1].value}; put it after --flagfile"
            )
    return found


def parse(arguments):
    """Returns the `Config` of a list of flags.

    Args:
        arguments: list of str, such as `"--total_epochs=9"`.

    Raises:
        parser.FlagError: an unknown flag, a value of the wrong type, or an
            argument that is not a flag.
        UserError: a flagfile is missing, or see `from_flags`.
    """
    values = flags.FlagValues()
    define_flags(values)
    parser.parse(arguments, values)
    return from_flags(values)


def names():
    """Names of all flags, including those of all methods."""
    return [f.name for f in flag_fields(Config)] + list(_method_fields())


def check(config):
    """Raises `UserError` for invalid values or combinations of values."""
    for option_value in (config, config.options):
        for field in flag_fields(type(option_value)):
            problem = field.metadata["check"](getattr(option_value, field.name))
            if problem:
                raise UserError(f"{problem} for --{field.name}; change it.")
    service_client.parse(config.data_service)
    check_schedule(config)
    if (
        config.batch_norm == "split"
        and config.batch_norm_splits != AUTO
        and config.batch_size % config.batch_norm_splits
    ):
        raise UserError(
            "Expected --batch_norm_splits to divide --batch_size="
            f"{config.batch_size}, received {config.batch_norm_splits}; change "
            "one of the two flags."
        )
    methods.load(config.method).check(config)


def to_flagfile(config, *, without=()):
    """Returns the text of a flagfile with all values of `config`.

    Args:
        config: `Config`.
        without: names of flags to leave out.
    """
    lines = [
        f"--{field.name}={spell(getattr(holder, field.name))}"
        for holder in (config, config.options)
        for field in flag_fields(type(holder))
        if field.name not in without
    ]
    return "\n".join(lines) + "\n"


def header(before=None):
    """The first lines of a run's flagfile: the versions that wrote it.

    A version that cannot read the checkpoints finds that out after it has
    written the flagfile, so the earlier versions stay in it.

    Args:
        before: text of the file from an earlier start; None: there is none.
    """
    earlier = [] if before is None else _versions(before)
    present = clsa_tf.__version__
    versions = [present, *(x for x in reversed(earlier) if x != present)]
    return "".join(f"{_HEADER}{version}\n" for version in versions)


def written_by(workdir):
    """Names the versions that wrote a run, see `stack.written_by`."""
    text = _flagfile_in(workdir)
    return "" if text is None else _written_by(text)


def older(text):
    """Values of flags that are missing from the flagfile of an older version.

    These flags have a value `before`, see `option`: how clsa_tf worked before
    the flag existed.

    Args:
        text: content of the flagfile.

    Returns:
        dict, name of a missing flag -> value.
    """
    names = _values(text)
    return {
        field.name: field.metadata["before"]
        for field in flag_fields(Config)
        if field.metadata["before"] is not None and field.name not in names
    }


def as_flags(values):
    """Formats a dict, name of a flag -> value, as `--name=value …`."""
    return " ".join(f"--{name}={spell(x)}" for name, x in values.items())


def older_in(workdir):
    """Calls `older` for the run in `workdir`; {} if there is no run."""
    text = _flagfile_in(workdir)
    return {} if text is None else older(text)


def _flagfile_in(workdir):
    """Text of the run's flagfile; None if there is no run."""
    try:
        with open(os.path.join(workdir, RUN_FLAGS), encoding="utf-8") as file:
            return file.read()
    except OSError:
        return None


def _values(text):
    """Reads a text of `to_flagfile`; dict, flag -> value as text."""
    lines = [line[2:] for line in text.split("\n") if line.startswith("--")]
    return dict(line.split("=", 1) for line in lines if "=" in line)


def load(workdir):
    """Returns the `Config` of the run in `workdir`.

    Raises:
        UserError: there is no run, or another version wrote its flags.
    """
    path = os.path.join(workdir, RUN_FLAGS)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as e:
        raise UserError(
            f"Expected the directory of a run, received {workdir!r} without "
            f"{RUN_FLAGS} ({e.strerror}); set --workdir to the directory of a "
            "run."
        ) from e
    return recorded(text, path)


def recorded(text, path):
    """Returns the `Config` of a run's flagfile.

    Flags that did not exist when it was written get the values of `older`, or
    their defaults.

    Args:
        text: content of the file, see `to_flagfile`.
        path: path of the file, for messages.

    Raises:
        UserError: the file has flags or values that this version does not
            support.
    """
    try:
        lines = [x for x in text.splitlines() if not x.startswith("#")]
        return parse(lines).replace(**older(text))
    except UserError as e:
        reason = str(e).split(";")[0].removeprefix("Expected ")
        raise UserError(
            f"Cannot use the flags in {path}: expected {reason}; use the "
            "version of clsa_tf that wrote the file, or correct it."
            + _written_by(text)
        ) from e


def _versions(text):
    """The versions of clsa_tf that wrote a flagfile, oldest first."""
    found = re.findall(f"^{re.escape(_HEADER)}(.+)$", text, re.MULTILINE)
    return found[::-1] or [_NO_HEADER]


def _written_by(text):
    return stack.written_by("The run", _versions(text))


def differences(before, now):
    """Compares two configurations.

    Flags that may change between two starts of one run, such as
    `--log_steps`, are ignored.

    Args:
        before: `Config` of the first run.
        now: `Config` of the second run.

    Returns:
        list of `(flag, value before, value now)` of the flags that differ,
        `--method` first, then in the order of the fields. Values are text, or
        None if the method does not have the flag.
    """
    one, two = _compared(before), _compared(now)
    return [
        (name, one.get(name), two.get(name))
        for name in dict.fromkeys(["method", *one, *two])
        if one.get(name) != two.get(name)
    ]


def _compared(config):
    """Flags that `differences` compares; dict, flag -> value as text."""
    return {
        field.name: spell(getattr(holder, field.name))
        for holder in (config, config.options)
        for field in flag_fields(type(holder))
        if not field.metadata["mutable_on_resume"]
    }


def changeable():
    """Flags that may differ between two starts of one run.

    Returns:
        dict, flag -> condition in words; "" if there is no condition.
    """
    return {
        f.name: f.metadata["on_resume"]
        for f in flag_fields(Config)
        if f.metadata["mutable_on_resume"] or f.metadata["on_resume"]
    }


def identity(config):
    """A 31-bit hash of the flags that `differences` compares."""
    values = [f"{name}={value}" for name, value in _compared(config).items()]
    return zlib.crc32("\n".join(values).encode()) >> 1


def _method_fields():
    """Options of all methods; dict, flag -> dict, method -> its field."""
    found = {}
    for method in methods.names():
        for field in flag_fields(methods.load(method).Options):
            found.setdefault(field.name, {})[method] = field
    return found


def _shown(owned):
    """Returns the method whose default of a flag is shown in the help.

    Args:
        owned: dict, method -> its field.
    """
    usual = Config.__dataclass_fields__["method"].default
    return usual if usual in owned else next(iter(owned))


def _for_all(owned):
    """Returns a field that accepts the values of every method with this flag.

    Its default is the one that is shown. The function `check` of this module
    then applies the check of the run's own method.

    Args:
        owned: dict, method -> its field.
    """

    def check(value):
        found = [f.metadata["check"](value) for f in owned.values()]
        return "" if "" in found else found[0]

    field = copy.copy(owned[_shown(owned)])
    field.metadata = dict(field.metadata) | {"check": check}
    return field
