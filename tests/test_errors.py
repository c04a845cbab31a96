import pytest
import tensorflow as tf

from clsa_tf.errors import first_line

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
def test_what_an_error_says(text, expected):
    error = tf.errors.UnavailableError(None, None, text)
    assert first_line(error) == expected


def test_errors_of_the_operating_system():
    assert first_line(OSError(28, "No space")) == "[Errno 28] No space"
