"""The summary of a finished run, and commands to copy."""

import shlex
import sys

import pytest

from clsa_tf.terminal import shell
from clsa_tf.training import metrics_log, summary
from tests import tiny

OPEN = {"spread": 0.9, "rank": 10.0, "uniformity": -3.0}


def sum_up(workdir, entries, **settings):
    config = tiny.config(workdir=str(workdir))
    workdir.mkdir(exist_ok=True)
    for entry in entries:
        metrics_log.append(workdir, entry)
    settings = dict(step=40, steps_per_epoch=10, seconds=3725.4) | settings
    return summary.of_run(config, **settings)


def test_the_summary_states_the_results(tmp_path):
    workdir = tmp_path / "a run"
    found = sum_up(
        workdir,
        [
            {"step": 10, "epoch": 1.0, "contrast": 3.1, "images_per_second": 9}
            | OPEN,
            {"step": 20, "epoch": 2.0, "knn": 0.71},
            {"step": 30, "epoch": 3.0, "contrast": 2.5}
            | {"images_per_second": 1234.4}
            | OPEN,
            {"step": 40, "epoch": 4.0, "contrast": 2.25}
            | {"images_per_second": 1234.4, "spread": 0.01, "rank": 3.0}
            | {"uniformity": -0.1},
            {"step": 40, "epoch": 4.0, "knn": 0.685},
        ],
        unreadable="3 unreadable images were left out.",
    )
    assert "4 epochs, 40 steps, in 1 h 02 min, 1,234 images/s" in found
    # ln(16 + 40): the keys of the batch and of the queue.
    assert "2.250 nats, at chance level 4.025" in found
    assert "68.5%, at best 71.0% after epoch 2" in found
    assert "warning: the projections have collapsed" in found
    assert "3 unreadable images were left out." in found
    *_, report, export = (line.strip() for line in found.splitlines())
    assert shlex.split(report)[-1] == f"--workdir={workdir}"
    assert shlex.split(export)[-1] == f"--output={workdir}/savedmodel"


def test_the_summary_leaves_out_missing_results(tmp_path):
    found = sum_up(tmp_path, [{"step": 40, "epoch": 4.0}], seconds=59.6)
    assert "in 1 min 00 s\n" in found
    for word in ("kNN", "nats", "warning", "unreadable", "images/s"):
        assert word not in found


def test_the_summary_marks_the_best_accuracy_so_far(tmp_path):
    found = sum_up(tmp_path, [{"step": 40, "epoch": 4.0, "knn": 0.5}])
    assert "50.0%, the best so far" in found


@pytest.mark.parametrize(
    "value", ["runs/x", "a b", "it's", "$HOME", "--x", "ü;rm", "~/x"]
)
def test_commands_are_quoted_for_a_shell(value):
    command = shell.of_module("clsa_tf.report", workdir=value, other=None)
    words = shlex.split(command)
    assert words == ["python", "-m", "clsa_tf.report", f"--workdir={value}"]


def test_the_typed_command_is_repeated(monkeypatch):
    class Spec:
        name = "clsa_tf.train"

    monkeypatch.setattr(sys.modules["__main__"], "__spec__", Spec)
    typed = [".venv/bin/python", "-m", "clsa_tf.train", "--workdir=a b"]
    monkeypatch.setattr(sys, "orig_argv", typed, raising=False)
    monkeypatch.setattr(sys, "argv", ["/x/clsa_tf/train.py", typed[-1]])
    assert shlex.split(shell.this()) == typed


def test_the_typed_program_is_repeated(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/mine.py", "a b"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert shell.this() == "mine.py 'a b'"
