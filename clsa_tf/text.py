"""Names from outside as text for a person."""

import os


def printable(path):
    """Returns a path or name as text that can be printed in one line.

    Args:
        path: str, or bytes as TensorFlow gives them. File names need not be
            valid text.

    Returns:
        str; what is not text or has no shape is "\N{REPLACEMENT CHARACTER}".
    """
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def abbreviated(text, fits):
    """Leaves out the middle of a text that is too long.

    Args:
        text: str.
        fits: function of a str that tells whether it is short enough.

    Returns:
        `text`, or its beginning and end with "…" in between.
    """
    if fits(text):
        return text
    for kept in range(len(text) - 1, 0, -1):
        tail = kept // 2
        shorter = text[: kept - tail] + "…" + text[len(text) - tail :]
        if fits(shorter):
            return shorter
    return "…"


def counted(number, noun):
    """Returns such as `1 step` or `2 steps`."""
    number = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{number} {noun}{'' if number == '1' else 's'}"


def listed(names, *, most=3, width=24):
    """Returns the first of several names, such as `2019, 2020, 2021, …`.

    Args:
        names: sequence of str.
        most: how many names.
        width: characters of a name; longer ones are abbreviated.
    """
    shown = [
        abbreviated(printable(name), lambda text: len(text) <= width)
        for name in names[:most]
    ]
    return ", ".join(shown + ["…"] * (len(names) > most))
