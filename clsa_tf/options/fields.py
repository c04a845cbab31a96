"""The parts that configurations are declared with: `option` and `Crop`."""

import dataclasses

# Of flags in the help, in this order -> what they are about.
GROUPS = {
    "data": "Data: what to train on and how to read it",
    "views": "Views (CROP is SIZE:MIN:MAX, px and shares of the image's area)",
    "method": "Method",
    "network": "Network",
    "optimization": "Optimization",
    "evaluation": "Evaluation",
    "run": "Run: where it is kept, and what computes it",
}
# The value of an option that is left to `clsa_tf.training.auto`.
AUTO = "auto"


def option(
    default,
    help,
    *,
    group="method",
    path=False,
    choices=None,
    minimum=None,
    above=None,
    maximum=None,
    below=None,
    mutable_on_resume=False,
    on_resume="",
    published=None,
    before=None,
):
    """Declares a field of a configuration, and so a flag.

    Args:
        default: its value unless set.
        help: what it is, with its unit.
        group: one of `GROUPS`.
        path: whether it is a path, in which `~` is the home directory.
        choices: the values it, or each element of a tuple, may take; or a
            function that returns them, for those that can be added to.
        minimum: smallest allowed value.
        above: bound that it must exceed.
        maximum: largest allowed value.
        below: bound that it must not reach.
        mutable_on_resume: whether the value may change between two starts of a
            run, and may differ between its workers.
        on_resume: condition under which the value may change between two
            starts, worded for a message ("to a larger number").
            `clsa_tf.training.workdir` checks it. Empty: the value is fixed,
            unless `mutable_on_resume` is set.
        published: value that `AUTO` becomes where data and length of the run
            allow it (see `clsa_tf.training.auto`); None: the option has no
            `AUTO`.
        before: what runs did before there was this flag, its value for those
            whose flagfile lacks it; None: they cannot be gone on with.
    """

    def check(value):
        """Says what is wrong with `value`; an empty string if nothing is."""
        if published is not None and value == AUTO:
            return ""
        allowed = choices() if callable(choices) else choices
        for part in value if isinstance(value, tuple) else (value,):
            if allowed is not None and part not in allowed:
                return (
                    f"Expected one of {', '.join(allowed)}, received {part!r}"
                )
        bounds = (
            (minimum, "at least", lambda b: value >= b),
            (above, "above", lambda b: value > b),
            (maximum, "at most", lambda b: value <= b),
            (below, "below", lambda b: value < b),
        )
        for bound, words, holds in bounds:
            if bound is None:
                continue
            # (`AUTO`, where another method of the same flag has it.)
            if isinstance(value, str) or not holds(bound):
                return f"Expected a value {words} {bound}, received {value}"
        return ""

    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "group": group,
            "path": path,
            "choices": choices,
            "check": check,
            "mutable_on_resume": mutable_on_resume,
            "on_resume": on_resume,
            "published": published,
            "before": before,
        },
    )


def choices_of(field):
    """Values that an option, or each element of it, may take; or None."""
    choices = field.metadata["choices"]
    return choices() if callable(choices) else choices


def override(options, name, default, *, published=None):
    """Declares an option of another dataclass again, with another default.

    Args:
        options: the other dataclass.
        name: of the option there.
        default: its value unless set.
        published: another value for `AUTO`, see `option`; None: the same.
    """
    field = options.__dataclass_fields__[name]
    metadata = dict(field.metadata)
    if published is not None:
        metadata["published"] = published
    return dataclasses.field(default=default, metadata=metadata)


def unresolved(options):
    """Names of the options, of a dataclass of them, that are still `AUTO`."""
    return [
        field.name
        for field in dataclasses.fields(options)
        if field.metadata.get("published") is not None
        and getattr(options, field.name) == AUTO
    ]


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
