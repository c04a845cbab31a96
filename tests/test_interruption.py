"""Signals are acknowledged at once, even while the main thread is busy."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from clsa_tf.errors import Stopped
from clsa_tf.terminal import native_log
from clsa_tf.terminal.signals import Interruption

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Starts like a command. `busy` is C code that cannot be interrupted, like
# TensorFlow's compiler.
COMMAND = """
import hashlib, os, signal, sys, time
from clsa_tf.cli import launch
from clsa_tf.terminal import signals
from clsa_tf.errors import Stopped
signals.begin()
def busy():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def handlers():
    return [signal.getsignal(number) for number in NUMBERS]


def wait_for(condition):
    deadline = time.time() + 10
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def standard_error(capfd):
    """Returns standard error without the log of TensorFlow's threads.

    Some threads outlive the tests that started them, for example one that waits
    for a tf.data service.
    """
    lines = capfd.readouterr().err.splitlines(keepends=True)
    return "".join(
        line
        for line in lines
        if line == "\n" or not native_log.is_note(line.encode())
    )


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_recorded_and_acknowledged(number, capfd):
    before = handlers()
    with Interruption("finishing") as interruption:
        assert interruption.signal == 0
        os.kill(os.getpid(), number)
        wait_for(lambda: interruption.signal)
        assert interruption.signal == number
        time.sleep(0.1)
    name = signal.Signals(number).name
    assert re.fullmatch(f"\n{name}: finishing; .*\n", standard_error(capfd))
    assert handlers() == before


def test_the_first_signal_counts(capfd):
    with Interruption() as interruption:
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        assert interruption.signal == signal.SIGHUP
    assert "SIGTERM" not in capfd.readouterr().err


def test_at_once_stops_immediately():
    with Interruption() as interruption, pytest.raises(Stopped) as stopped:
        with interruption.at_once("leaving"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
    assert stopped.value.signal == signal.SIGTERM and stopped.value.saved
    with pytest.raises(Stopped), interruption.at_once("leaving"):
        raise AssertionError("It was asked to stop before.")


def test_an_inner_block_leaves_the_outer_one_in_force():
    with Interruption() as interruption, pytest.raises(Stopped):
        with interruption.at_once("leaving"):
            with interruption.at_once("leaving something else"):
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
            raise AssertionError("It went on.")


def test_handlers_of_exception_do_not_catch_a_stop():
    with pytest.raises(Stopped) as stopped:
        with Interruption("stopping", stop=True):
            try:
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(10)
            except Exception:
                raise AssertionError("Handled.") from None
    assert stopped.value.saved is None


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not interruption.signal
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interruptions_can_be_nested(capfd):
    before = handlers()
    with Interruption("outer") as outer:
        with Interruption("inner") as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: inner.signal)
        assert not outer.signal
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: outer.signal)
    assert handlers() == before


class Command:
    """Code in a process that receives signals; both streams are read as one.

    Args:
        script: code after `COMMAND`; it has to print "busy".
    """

    def __init__(self, script):
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND + script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Shells start background processes with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self._process.stdout.readline() == "busy\n"
        time.sleep(0.2)

    def send(self, number):
        """Sends a signal; returns the next line that is printed."""
        self._process.send_signal(number)
        assert self._process.stdout.readline() == "\n"
        return self._process.stdout.readline()

    def end(self, number=0):
        """Returns status, seconds until then, and the rest of the output."""
        start = time.time()
        if number:
            self._process.send_signal(number)
        printed = self._process.stdout.read()
        return self._process.wait(60), time.time() - start, printed


@pytest.mark.parametrize("number", NUMBERS)
def test_a_starting_command_ends_at_once(number):
    command = Command("busy()")
    assert command.send(number).startswith(f"{signal.Signals(number).name}: ")
    status, seconds, printed = command.end()
    assert status == 128 + number and seconds < 2 and not printed


def test_a_compilation_ends_at_once():
    command = Command(
        "with signals.Interruption() as i, i.at_once('leaving it'): busy()"
    )
    assert command.send(signal.SIGTERM) == "SIGTERM: leaving it\n"
    status, seconds, printed = command.end()
    assert status == 143 and seconds < 2 and not printed


def test_a_second_ctrl_c_ends_uninterruptible_code():
    command = Command("with signals.Interruption('saving'): busy()")
    answer = command.send(signal.SIGINT)
    assert answer.startswith("SIGINT: saving; ")
    status, seconds, _ = command.end(signal.SIGINT)
    assert status == 130 and seconds < 2


def test_a_second_ctrl_c_is_a_keyboard_interrupt_in_other_programs(capfd):
    with pytest.raises(KeyboardInterrupt):
        with Interruption("saving") as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: interruption.signal)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
    assert re.fullmatch("\nSIGINT: saving; .*\n", standard_error(capfd))


def test_a_started_command_does_not_mention_its_start():
    command = Command(
        "with signals.Interruption(stop=True): signals.started()\nbusy()"
    )
    answer = command.send(signal.SIGINT)
    assert answer.startswith("SIGINT: ") and "start" not in answer
    assert command.end()[0] == 130


def test_a_command_runs_its_cleanup():
    command = Command(
        "def main():\n"
        "    try: print('busy', flush=True); time.sleep(60)\n"
        "    finally: print('tidy')\n"
        "sys.argv[1:] = []\n"
        "launch.launch(main, lambda flag_values: None)"
    )
    assert "SIGTERM: stopping" in command.send(signal.SIGTERM)
    status, _, printed = command.end()
    assert status == 143 and printed == "tidy\nStopped by SIGTERM.\n"


def test_a_command_that_cannot_clean_up_also_ends():
    command = Command(
        "sys.argv[1:] = []\nlaunch.launch(busy, lambda flag_values: None)"
    )
    assert "SIGINT: stopping" in command.send(signal.SIGINT)
    status, seconds, _ = command.end()
    assert status == 130 and seconds < 10
