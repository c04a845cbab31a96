"""Progress on standard error: a bar on a terminal, lines in a log file."""

import contextlib
import io
import sys
import threading

import tqdm

_SECONDS_PER_LOOK = 0.5
_SECONDS_PER_LINE = 10.0


def on_terminal():
    """Whether a person looks at standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def bar(total, *, initial=0, unit, shown=True, optional=()):
    """A progress bar that keeps what matters on a narrow terminal.

    Args:
        total: units of work in all.
        initial: of these, those done before.
        unit: what they are called, a plural.
        shown: False makes one that shows nothing.
        optional: names of values, see `set_values`, that may be left out, the
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
        # In a log file: a line every so often instead of a moving bar.
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
        """Sets strings to be shown at the next refresh, a dictionary."""
        self._values |= values

    @contextlib.contextmanager
    def doing(self, what):
        """Shows in words what is done instead of progress, while entered."""
        self._doing = what
        self.refresh()
        try:
            yield
        finally:
            self._doing = ""

    @property
    def format_dict(self):
        """What `tqdm` makes a line of; it asks for it at every refresh."""
        found = super().format_dict
        width = found["ncols"]
        for layout in _layouts(self._values, self._optional, self._doing):
            line = tqdm.tqdm.format_meter(**found | layout | {"ncols": None})
            if not width or len(line) <= width:
                break
        return found | layout


def _layouts(values, optional, doing):
    """Yields what to show, from the widest to the narrowest line.

    Args:
        values: dictionary of strings.
        optional: names of those that may be left out.
        doing: what is done instead of progress, or "".

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
    """A stream for lines of a log, which leaves a bar below them whole."""

    def write(self, text):
        """Writes text to standard error."""
        tqdm.tqdm.write(text, file=sys.stderr, end="")

    def flush(self):
        """Does what streams do."""
        sys.stderr.flush()


def say(text, file=None):
    """Prints a line above bars and what is being waited for.

    Args:
        text: the line.
        file: stream; None: standard output.
    """
    tqdm.tqdm.write(text, file=file or sys.stdout)


@contextlib.contextmanager
def waiting(what):
    """Says what is being waited for, while entered.

    On a terminal in a line that counts the seconds and then vanishes, in a log
    file in a line.

    Args:
        what: in words, such as "compiling the training step".
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
