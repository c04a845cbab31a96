"""The parts that configurations are declared with: `option` and `Crop`."""

import dataclasses


def option(
    default,
    help,
    *,
    choices=None,
    minimum=None,
    above=None,
    maximum=None,
    below=None,
    portable=False,
    before=None,
):
    """Declares a field of a configuration, and so a flag.

    Args:
        default: its value unless set.
        help: what it is, with its unit.
        choices: the values it, or each element of a tuple, may take.
        minimum: smallest allowed value.
        above: bound that it must exceed.
        maximum: largest allowed value.
        below: bound that it must not reach.
        portable: whether it may differ between two starts of one run.
        before: what runs did before there was this flag, its value for those
            whose flagfile lacks it; None: they cannot be gone on with.
    """

    def check(value):
        """Says what is wrong with `value`; an empty string if nothing is."""
        for part in value if isinstance(value, tuple) else (value,):
            if choices is not None and part not in choices:
                return (
                    f"Expected one of {', '.join(choices)}, received {part!r}"
                )
        bounds = (
            (minimum, "at least", lambda b: value >= b),
            (above, "above", lambda b: value > b),
            (maximum, "at most", lambda b: value <= b),
            (below, "below", lambda b: value < b),
        )
        for bound, words, holds in bounds:
            if bound is not None and not holds(bound):
                return f"Expected a value {words} {bound}, received {value}"
        return ""

    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "check": check,
            "portable": portable,
            "before": before,
        },
    )


def but(options, name, default):
    """Declares an option of another dataclass again, with another default."""
    field = options.__dataclass_fields__[name]
    return dataclasses.field(default=default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True)
class Crop:
    """A random resized crop; spelled `size:min_area:max_area` in flags.

    Attributes:
        size: side of the result, in px.
        min_area: smallest share of the image's area, in (0, 1].
        max_area: largest share, in [min_area, 1].
    """

    size: int
    min_area: float
    max_area: float

    @classmethod
    def parse(cls, text):
        """Parses `"224:0.2:1"`.

        Raises:
            ValueError: not of that form or out of range.
        """
        try:
            size, low, high = text.split(":")
            crop = cls(int(size), float(low), float(high))
        except ValueError:
            crop = None
        if crop is None or not (
            crop.size >= 1 and 0 < crop.min_area <= crop.max_area <= 1
        ):
            raise ValueError(
                "crops as size:min_area:max_area with 0 < min_area <= max_area "
                "<= 1, such as 224:0.2:1, separated by commas"
            )
        return crop

    @classmethod
    def parse_all(cls, text):
        """Parses `"2x224:0.14:1,6x96:0.05:0.14"`: a tuple of crops.

        Raises:
            ValueError: not of that form or out of range.
        """
        crops = []
        for part in text.split(",") if text else []:
            times, _, crop = part.rpartition("x")
            if times and not (times.isdigit() and 1 <= int(times) <= 100):
                raise ValueError(
                    "crops, such as 224:0.2:1, repeated by a whole number of "
                    "times from 1 to 100, such as 6x96:0.05:0.14"
                )
            crops += [cls.parse(crop)] * int(times or 1)
        return tuple(crops)

    def __str__(self):
        """The spelling that `parse` reads."""
        return f"{self.size}:{self.min_area}:{self.max_area}"
