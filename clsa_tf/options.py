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
):
    """Declares a field of a configuration, and so a flag.

    Args:
        default: its value unless set.
        help: what it is, with its unit.
        choices: the values it may take.
        minimum: smallest allowed value.
        above: bound that it must exceed.
        maximum: largest allowed value.
        below: bound that it must not reach.
        portable: whether it may differ between two starts of one run.
    """

    def check(value):
        """Says what is wrong with `value`; an empty string if nothing is."""
        if choices is not None and value not in choices:
            return f"Expected one of {', '.join(choices)}, received {value!r}"
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
        metadata={"help": help, "check": check, "portable": portable},
    )


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

    def __str__(self):
        """The spelling that `parse` reads."""
        return f"{self.size}:{self.min_area}:{self.max_area}"
