"""Progress bars and lines on terminals and in log files."""

import io
import logging
import sys

import pytest
import tqdm

from clsa_tf.terminal import progress

VALUES = {
    "epoch": "12.5",
    "loss": "13.279",
    "ddm": "6.978",
    "acc": "0.523",
    "kNN": "0.612",
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use_terminal(monkeypatch, columns=80):
    """Makes standard error a terminal; has to be called within the test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    # `dynamic_ncols` calls this.
    monkeypatch.setattr(
        "tqdm.std._screen_shape_wrapper", lambda: lambda _: (columns, 24)
    )
    return stream


def training_bar():
    bar = progress.bar(
        240_000, initial=80_000, unit="images", optional=("ddm", "epoch")
    )
    bar.set_values(VALUES)
    # Times with hours are the longest.
    bar.start_t -= 3700
    bar.n = 120_000
    return bar


def test_eighty_columns_keep_accuracy_and_knn(monkeypatch):
    use_terminal(monkeypatch)
    with training_bar() as bar:
        line = str(bar)
    assert len(line) <= 80
    assert "50%" in line and "acc=0.523" in line and "kNN=0.612" in line


@pytest.mark.parametrize("columns", range(40, 160, 3))
def test_less_important_parts_are_left_out_first(columns, monkeypatch):
    use_terminal(monkeypatch, columns)
    with training_bar() as bar:
        line = str(bar)
    assert len(line) <= columns
    assert "loss=13.279, " in line and "acc=0.523, kNN=0.612" in line
    # In the order in which they are left out when the terminal gets narrower.
    parts = (" images/s", "ddm=", "|", "<", "/s", "3:05:0", "epoch=")
    shown = [part in line for part in parts]
    assert shown == sorted(shown), line
    assert columns < 112 or all(shown)


def test_a_log_file_gets_the_whole_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with training_bar() as bar:
        line = str(bar)
    for name, value in VALUES.items():
        assert f"{name}={value}" in line
    assert "|" in line and " images/s" in line


def test_the_bar_shows_another_activity(monkeypatch):
    use_terminal(monkeypatch)
    with training_bar() as bar, bar.doing("evaluating"):
        assert "evaluating" in str(bar) and "images/s" not in str(bar)
    assert "evaluating" not in str(bar)


def test_a_log_line_does_not_break_the_bar(monkeypatch):
    terminal = use_terminal(monkeypatch)
    handler = logging.StreamHandler(progress.LogStream())
    with training_bar() as bar:
        bar.refresh()
        text = "Cannot read the image x.jpg"
        handler.emit(logging.makeLogRecord({"msg": text}))
    # The bar is erased, the line is printed, and the bar is drawn below it.
    before, after, _ = terminal.getvalue().split("\n")
    *bars, wiped, line = before.split("\r")
    assert "50%" in bars[-1] and wiped.isspace() and line == text
    assert "50%" in after


def test_waiting_counts_on_a_terminal_and_leaves_no_line(monkeypatch):
    terminal = use_terminal(monkeypatch)
    with progress.waiting("compiling"):
        assert "compiling … 00:00" in terminal.getvalue()
    *_, last = terminal.getvalue().rstrip("\r").split("\r")
    assert not last.strip() and "\n" not in terminal.getvalue()
    assert not tqdm.tqdm._instances


def test_waiting_is_one_line_in_a_log_file(capsys):
    with progress.waiting("compiling"):
        pass
    assert capsys.readouterr().err == "compiling …\n"
