"""Formats names, counts and lists for messages."""

import os


def printable(path):
    """Converts a path or name to text that can be printed in one line.

    Args:
        path: str, or bytes as TensorFlow returns them. File names need not be
            valid UTF-8.

    Returns:
        str; invalid bytes and unprintable characters are replaced by
        "\N{REPLACEMENT CHARACTER}".
    """
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def abbreviated(text, fits):
    """Shortens a text by replacing its middle with "…".

    Args:
        text: str.
        fits: function of a str that returns whether it is short enough.

    Returns:
        `text` if it fits, otherwise its beginning and end with "…" in between.
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
    """Formats a count with its noun, such as `1 step` or `2 steps`."""
    number = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{number} {noun}{'' if number == '1' else 's'}"


def listed(names, *, most=3, width=24):
    """Formats the first names of a list, such as `2019, 2020, 2021, …`.

    Args:
        names: sequence of str.
        most: largest number of names to show.
        width: largest number of characters of a name; longer ones are
            abbreviated.
    """
    shown = [
        abbreviated(printable(name), lambda text: len(text) <= width)
        for name in names[:most]
    ]
    return ", ".join(shown + ["…"] * (len(names) > most))
