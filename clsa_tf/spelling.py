"""Values as flags spell them, and flags that say what is wrong with one."""

import typing

from absl import flags

from clsa_tf.options import AUTO, Crop


def spell(value):
    """Returns a value as it is written behind a flag's `=`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def define(field, prefix, flag_values):
    """Defines the flag of a field that `clsa_tf.options.option` declared.

    Args:
        field: `dataclasses.Field`.
        prefix: of its help text.
        flag_values: where to.
    """
    flag = flags.Flag(
        _Parser(field),
        _Serializer(),
        field.name,
        field.default,
        prefix + field.metadata["help"],
        boolean=field.type is bool,  # --name and --noname
    )
    flags.DEFINE_flag(flag, flag_values)


class _Serializer(flags.ArgumentSerializer):
    def serialize(self, value):
        return spell(value)


class _Parser(flags.ArgumentParser):
    """Parses one flag; its errors say what was expected and what came."""

    syntactic_help = ""

    def __init__(self, field):
        self._field = field

    def parse(self, argument):
        if isinstance(argument, str):
            try:
                value = self._from_string(argument)
            except ValueError as e:
                raise ValueError(
                    f"Expected {e}, received {argument!r}."
                ) from None
        else:
            value = argument
        problem = self._field.metadata["check"](value)
        if problem:
            raise ValueError(problem + ".")
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
        return text

    def flag_type(self):
        return getattr(self._field.type, "__name__", "crops")
