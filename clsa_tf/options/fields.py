"""Declares the fields of a configuration: `option`, `override` and `Crop`."""

import dataclasses

# Group of flags -> its title in the help, in the order of the help.
GROUPS = {
    "data": "Data: what to train on and how to read it",
    "views": "Views (CROP is SIZE:MIN:MAX, px and shares of the image's area)",
    "method": "Method",
    "network": "Network",
    "optimization": "Optimization",
    "evaluation": "Evaluation",
    "run": "Run: its directory and its devices",
}
# Value of an option that `clsa_tf.training.auto` resolves.
AUTO = "auto"


def option(
    default,
    help,
    *,
    group="method",
    path=False,
    choices=None,
    problem=None,
    minimum=None,
    above=None,
    maximum=None,
    below=None,
    mutable_on_resume=False,
    on_resume="",
    published=None,
    before=None,
):
    """Declares a field of a configuration, and its flag.

    Args:
        default: default value.
        help: help text of the flag, with the unit.
        group: one of `GROUPS`.
        path: whether the value is a path, in which `~` is the home directory.
        choices: allowed values of the field or, for a tuple, of its elements;
            or a function that returns them, for registries that can grow.
        problem: function of a value that returns an error message ("Expected
            ..., received ..."), or "" if the value is valid.
        minimum: smallest allowed value.
        above: exclusive lower bound.
        maximum: largest allowed value.
        below: exclusive upper bound.
        mutable_on_resume: whether the value may change between two starts of a
            run, and may differ between its workers.
        on_resume: condition under which the value may change between two
            starts, worded for a message ("to a larger number").
            `clsa_tf.training.workdir` checks it. Empty: the value is fixed,
            unless `mutable_on_resume` is set.
        published: published value, to which `AUTO` resolves if data and length
            of the run allow it; None: the option cannot be `AUTO`.
            `clsa_tf.training.auto` resolves the options that it knows, and
            `Method.resolve_auto` all others of a method. The method's
            function `check` has to accept `AUTO`.
        before: value of the flag for runs whose flagfile is older than the
            flag; None: the default value.
    """

    def check(value):
        """Returns what is wrong with `value`; empty if it is valid."""
        if published is not None and value == AUTO:
            return ""
        allowed = choices() if callable(choices) else choices
        for part in value if isinstance(value, tuple) else (value,):
            if allowed is not None and part not in allowed:
                return (
                    f"Expected one of {', '.join(allowed)}, received {part!r}"
                )
        if problem and problem(value):
            return problem(value)
        bounds = (
            (minimum, "at least", lambda b: value >= b),
            (above, "above", lambda b: value > b),
            (maximum, "at most", lambda b: value <= b),
            (below, "below", lambda b: value < b),
        )
        for bound, words, holds in bounds:
            if bound is None:
                continue
            # A string here is `AUTO`, which only another method's field allows.
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
    """Allowed values of an option, or of its elements; None without choices."""
    choices = field.metadata["choices"]
    return choices() if callable(choices) else choices


def override(options, name, default, *, published=None):
    """Redeclares an inherited option with another default.

    Args:
        options: dataclass that declares the option.
        name: name of the option.
        default: the new default.
        published: another published value, see `option`; None: the same.
    """
    field = options.__dataclass_fields__[name]
    metadata = dict(field.metadata)
    if published is not None:
        metadata["published"] = published
    return dataclasses.field(default=default, metadata=metadata)


def unresolved(options):
    """Names of the fields of a dataclass of options that are still `AUTO`."""
    return [
        field.name
        for field in dataclasses.fields(options)
        if field.metadata.get("published") is not None
        and getattr(options, field.name) == AUTO
    ]


@dataclasses.dataclass(frozen=True)
class Crop:
    """A random resized crop, written `size:min_area:max_area` in flags.

    Attributes:
        size: side of the result, in px.
        min_area: smallest crop as a share of the image's area, in (0, 1].
        max_area: largest crop as a share of the area, in [min_area, 1].
    """

    size: int
    min_area: float
    max_area: float

    @classmethod
    def parse(cls, text):
        """Parses a crop such as `"224:0.2:1"`.

        Raises:
            ValueError: the text has another form or is out of range. The
                message is the expected form.
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
                "crops size:min_area:max_area with 0 < min_area <= max_area "
                "<= 1, separated by commas, such as 224:0.2:1"
            )
        return crop

    @classmethod
    def parse_all(cls, text):
        """Parses crops such as `"2x224:0.14:1,6x96:0.05:0.14"` into a tuple.

        Raises:
            ValueError: the text has another form or is out of range. The
                message is the expected form.
        """
        crops = []
        for part in text.split(",") if text else []:
            times, _, crop = part.rpartition("x")
            if times and not (times.isdigit() and 1 <= int(times) <= 100):
                raise ValueError(
                    "crops with a repetition from 1 to 100, such as "
                    "6x96:0.05:0.14"
                )
            crops += [cls.parse(crop)] * int(times or 1)
        return tuple(crops)

    def __str__(self):
        """Returns the text that `parse` reads."""
        return f"{self.size}:{self.min_area}:{self.max_area}"
