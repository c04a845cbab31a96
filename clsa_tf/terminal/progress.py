"""Progress on standard error: a bar on a terminal, lines in a log file."""

import contextlib
import io
import sys
import threading

import tqdm

_SECONDS_PER_LOOK = 0.5
_SECONDS_PER_LINE = 10.0


def on_terminal():
    """Whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def bar(total, *, initial=0, unit, shown=True, optional=()):
    """Makes a progress bar that drops less important parts to fit the width.

    Args:
        total: total units of work.
        initial: units that are already done.
        unit: name of the units, a plural.
        shown: False makes a bar that shows nothing.
        optional: names of values, see `set_values`, that may be dropped, the
            least important one first.

    Returns:
        `tqdm.tqdm` with two more methods, `set_values` and `doing`.
    """
    return _Bar(
        total=total,
        initial=initial,
        unit=f" {unit}",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not shown,
        # In a log file, new lines at longer intervals replace a moving bar.
        mininterval=_SECONDS_PER_LOOK if on_terminal() else _SECONDS_PER_LINE,
        optional=optional,
    )


class _Bar(tqdm.tqdm):
    """See `bar`."""

    def __init__(self, *, optional, **settings):
        self._optional = optional
        self._values = {}
        self._doing = ""
        super().__init__(**settings)

    def set_values(self, values):
        """Sets values, dict of str -> str, to show from the next refresh on."""
        self._values |= values

    @contextlib.contextmanager
    def doing(self, what):
        """Context manager that shows the activity `what` in place of a rate."""
        self._doing = what
        self.refresh()
        try:
            yield
        finally:
            self._doing = ""

    @property
    def format_dict(self):
        """Parts of the line; `tqdm` reads this at every refresh."""
        found = super().format_dict
        width = found["ncols"]
        for layout in _layouts(self._values, self._optional, self._doing):
            line = tqdm.tqdm.format_meter(**found | layout | {"ncols": None})
            if not width or len(line) <= width:
                break
        return found | layout


def _layouts(values, optional, doing):
    """Yields layouts of the line, from the widest to the narrowest.

    Args:
        values: dict of str -> str.
        optional: names of values that may be dropped.
        doing: activity to show in place of the rate, or "".

    Returns:
        generator of keyword arguments of `tqdm.tqdm.format_meter`.
    """
    parts = {"elapsed": "{elapsed}<{remaining}", "rate": "{rate_fmt}"} | {
        name: f"{name}={value}" for name, value in values.items()
    }
    if doing:
        parts["rate"] = doing
    share, unit = "{percentage:3.0f}%|{bar:12}| ", {}

    def layout():
        return {"bar_format": share + ", ".join(parts.values())} | unit

    yield layout()
    share = "{percentage:3.0f}%|{bar:4}| "
    yield layout()
    unit = {"unit": ""}
    yield layout()
    for name in optional[:1]:
        parts.pop(name, None)
        yield layout()
    share = "{percentage:3.0f}% "
    yield layout()
    parts["elapsed"] = "{remaining}"
    yield layout()
    for name in ("rate", "elapsed", *optional[1:]):
        parts.pop(name, None)
        yield layout()


class LogStream(io.TextIOBase):
    """A stream for log lines, which appear above a progress bar."""

    def write(self, text):
        """Writes text to standard error."""
        tqdm.tqdm.write(text, file=sys.stderr, end="")

    def flush(self):
        """Flushes standard error."""
        sys.stderr.flush()


def write(text, file=None):
    """Prints a line above progress bars and the lines of `waiting`.

    Args:
        text: the line.
        file: stream; None: standard output.
    """
    tqdm.tqdm.write(text, file=file or sys.stdout)


@contextlib.contextmanager
def waiting(what):
    """Context manager that shows a slow activity.

    A terminal shows a line that counts the seconds and then vanishes. A log
    file gets one line.

    Args:
        what: the activity, such as "compiling the training step".
    """
    if not on_terminal():
        print(f"{what} …", file=sys.stderr, flush=True)
        yield
        return
    line = tqdm.tqdm(
        bar_format=f"{what} … {{elapsed}}", leave=False, dynamic_ncols=True
    )
    over = threading.Event()

    def count():
        while not over.wait(_SECONDS_PER_LOOK):
            line.refresh()

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        line.close()
