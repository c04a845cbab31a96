"""Flags made from fields of a configuration: parsing and formatting."""

import os
import typing

from absl import flags

from clsa_tf.options.fields import AUTO, Crop


class Written(typing.NamedTuple):
    """One place where a flag is set.

    Attributes:
        position: index among all arguments, including those in flagfiles.
        value: value as text.
        files: see `clsa_tf.cli.flagfiles.Argument`; () for the command line.
    """

    position: int
    value: str
    files: tuple


class Flag(flags.Flag):
    """The flag of a field of a configuration.

    Attributes:
        field: the `dataclasses.Field`.
        owners: dict, method -> its field, for options of methods; otherwise
            None.
        written: list of `Written`; the last one determines the value.
    """

    def __init__(self, field, owners=None):
        """See the class."""
        super().__init__(
            _Parser(field),
            _Serializer(),
            field.name,
            field.default,
            field.metadata["help"],
            boolean=field.type is bool,  # --name and --noname
        )
        self.field = field
        self.owners = owners
        self.written = []

    @property
    def files(self):
        """Flagfile that set the value, see `Written`; () if none did."""
        return self.written[-1].files if self.written else ()


def spell(value):
    """Formats a value as it is written after a flag's `=`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value)


def expand_user(text):
    """Expands `~` in a path, and after a prefix as in `folder:~/photos`."""
    prefix, colon, path = text.partition(":")
    if path.startswith("~"):
        return prefix + colon + os.path.expanduser(path)
    return os.path.expanduser(text)


def define_path(name, default, help, flag_values):
    """Defines a flag that is the path of a file or directory."""
    flags.DEFINE(_PathParser(), name, default, help, flag_values)


def require(flag_values, *names):
    """Marks flags as required."""
    for name in names:
        flag_values[name].needed = True


def is_required(flag):
    """Whether `require` was called for a flag."""
    return getattr(flag, "needed", False)


class _PathParser(flags.ArgumentParser):
    def parse(self, argument):
        return expand_user(os.fspath(argument))

    def flag_type(self):
        return "path"


class _Serializer(flags.ArgumentSerializer):
    def serialize(self, value):
        return spell(value)


class _Parser(flags.ArgumentParser):
    """Parses one flag. Errors have the form "Expected X, received Y"."""

    syntactic_help = ""

    def __init__(self, field):
        self._field = field

    def parse(self, argument):
        if isinstance(argument, str):
            try:
                value = self._from_string(argument)
            except ValueError as e:
                raise ValueError(f"Expected {e}, received {argument!r}") from (
                    None
                )
        else:
            value = argument
        problem = self._field.metadata["check"](value)
        if problem:
            raise ValueError(problem)
        return value

    def _from_string(self, text):
        kind = self._field.type
        if text == AUTO and self._field.metadata["published"] is not None:
            return AUTO
        if kind is bool:
            try:
                return flags.BooleanParser().parse(text)
            except ValueError:
                raise ValueError("true or false") from None
        if kind in (int, float):
            noun = "a whole number" if kind is int else "a number"
            try:
                return kind(text)
            except ValueError:
                raise ValueError(noun) from None
        if kind is Crop:
            return Crop.parse(text)
        if kind == tuple[Crop, ...]:
            return Crop.parse_all(text)
        if kind == tuple[str, ...]:
            return tuple(text.split(",")) if text else ()
        if kind in (tuple[int, ...], tuple[float, ...]):
            number = typing.get_args(kind)[0]
            noun = "whole numbers" if number is int else "numbers"
            try:
                return tuple(map(number, text.split(","))) if text else ()
            except ValueError:
                raise ValueError(f"{noun} separated by commas") from None
        return expand_user(text) if self._field.metadata["path"] else text

    def flag_type(self):
        if self._field.metadata["path"]:
            return "path"
        kind = self._field.type
        if kind is Crop or kind == tuple[Crop, ...]:
            return "crop" if kind is Crop else "crops"
        part = typing.get_args(kind)
        return f"{part[0].__name__}s" if part else kind.__name__
