import errno
import sys

import pytest
import tensorflow as tf

from clsa_tf.cli import launch
from clsa_tf.errors import first_line, is_of_disk

LOST = "Collective ops is aborted by: Task 1 heartbeat timeout."


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"{{{{function_node a_{{b}}_c}}}} {LOST}\nRestart.", LOST),
        (f"{{{{node a}}}}\n{LOST}", LOST),
        (
            "Graph execution error:\n\nDetected at node 'x' defined at:\n"
            '<stack traces>\n    File "a.py"\n'
            f"{LOST} [Op:x]",
            f"{LOST} [Op:x]",
        ),
        (" indented only", "indented only"),
        ("", "UnavailableError"),
        (500 * "x", 300 * "x"),
    ],
)
def test_first_line_is_the_message_of_an_error(text, expected):
    error = tf.errors.UnavailableError(None, None, text)
    assert first_line(error) == expected


def test_first_line_of_system_errors_has_their_number():
    assert first_line(OSError(28, "No space")) == "[Errno 28] No space"


FULL = "/out/variables; No space left on device"


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.ENOENT, "No space left on device"), False),
        # Messages of HDF5 and TensorFlow.
        (OSError("Can't write data (error message = 'Disk quota exceeded')"),)
        + (True,),
        (RuntimeError("Can't flush: No space left on device"), True),
        (tf.errors.ResourceExhaustedError(None, None, FULL), True),
        (tf.errors.ResourceExhaustedError(None, None, "OOM"), False),
        (ValueError("shape"), False),
    ],
)
def test_errors_of_full_disks_are_recognised(error, expected):
    assert is_of_disk(error) is expected


@pytest.mark.parametrize("message, known", [(FULL, True), ("OOM", False)])
def test_commands_report_a_full_disk(capsys, monkeypatch, message, known):
    def main():
        raise tf.errors.ResourceExhaustedError(None, None, message)

    monkeypatch.setattr(sys, "argv", ["command"])
    if not known:
        with pytest.raises(tf.errors.ResourceExhaustedError):
            launch.launch(main, lambda flag_values: None)
        return
    with pytest.raises(SystemExit) as end:
        launch.launch(main, lambda flag_values: None)
    assert end.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert FULL in printed and len(printed.splitlines()) == 1
