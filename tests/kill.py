"""Kills a training run repeatedly and compares its result.

`python -m tests.kill --kills=20 --seed=0` starts a small run, kills it
(SIGKILL) at a random moment and starts it again, 20 times in all; then the run
may finish. At least every third kill comes while a checkpoint is being written.
The exit status is 1 unless checkpoints and metrics equal those of an
undisturbed run.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import sys
import tempfile
import time

from clsa_tf.training.checkpoint import UNFINISHED, list_checkpoints
from tests import runs
from tests.photos import write_folder

PHOTOS_PER_CLASS = 55  # 6 steps an epoch
EPOCHS_PER_KILL = 0.75

# The targets of the kills, in turn; every third is a checkpoint.
CHECKPOINT, EVALUATION, TRAINING, START = (
    "while writing a checkpoint",
    "during evaluation",
    "while training",
    "before the first step",
)
AIMS = (CHECKPOINT, EVALUATION, TRAINING, CHECKPOINT, START, TRAINING)


class Run:
    """A run that is started and killed repeatedly.

    Args:
        arguments: its command.
        workdir: its directory.
        steps_per_epoch: int.
        startup: approximate seconds from its start to its first step.
        rng: `random.Random`.
    """

    def __init__(self, arguments, workdir, *, steps_per_epoch, startup, rng):
        self._arguments = arguments
        self._workdir = workdir
        self._steps_per_epoch = steps_per_epoch
        self._startup = startup
        self._rng = rng

    def step(self):
        """Step of the newest checkpoint."""
        paths = list_checkpoints(str(self._workdir / "checkpoints"))
        return int(paths[0].rsplit("-", 1)[1]) if paths else 0

    def unfinished(self):
        """Files of a checkpoint being written: (path, time of change)."""
        folder = self._workdir / "checkpoints" / UNFINISHED
        found = set()
        for where, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(where, name)
                with contextlib.suppress(FileNotFoundError):  # since renamed
                    found.add((path, os.stat(path).st_mtime_ns))
        return found

    def evaluation_pending(self):
        """Whether the newest checkpoint ends an epoch not evaluated yet."""
        step = self.step()
        return step % self._steps_per_epoch == 0 and not any(
            line["step"] == step
            for line in runs.lines(self._workdir)
            if "knn" in line
        )

    def kill(self, aim):
        """Starts and kills the run; returns where, None if it ended before."""
        before, stale = self.step(), self.unfinished()
        started = time.time()
        process = runs.start(self._arguments)
        try:
            self._await(aim, process, before, stale)
        finally:
            process.kill()
            status = process.wait()
        if status == 0:
            return None
        if status != -9:
            raise SystemExit(f"Expected a run to kill, received {status}.")
        step = self.step()
        # The files left show where the kill hit, whatever its target.
        if self.unfinished() - stale:
            where = CHECKPOINT
        elif step == before:
            where = START
        else:
            where = EVALUATION if self.evaluation_pending() else TRAINING
        seconds = time.time() - started
        print(
            f"  step {before:3} to {step:3}, {seconds:3.0f} s: {where}",
            flush=True,
        )
        return where

    def _await(self, aim, process, before, stale):
        """Waits until the moment to kill."""
        if aim == START:
            time.sleep(self._rng.uniform(0, self._startup))
        elif aim == EVALUATION:
            runs.wait_until(
                lambda: self.step() > before and self.evaluation_pending(),
                process,
            )
            time.sleep(self._rng.uniform(0, 0.2))
        elif aim == TRAINING:
            runs.wait_until(lambda: self.step() > before, process, pause=0.0002)
            # Half of these kills come right after a checkpoint.
            if self._rng.random() < 0.5:
                time.sleep(self._rng.uniform(0, 0.7))
        else:
            steps = before + self._rng.choice((0, 1, 2))
            runs.wait_until(lambda: self.step() >= steps, process)
            runs.wait_until(
                lambda: self.unfinished() - stale, process, pause=0.0002
            )


def undisturbed(arguments, workdir):
    """Runs to the end; returns approximate seconds to the first step."""
    started = time.time()
    process = runs.start(arguments)
    runs.wait_until(lambda: runs.saved(workdir, 1), process)
    startup = time.time() - started
    if process.wait():
        raise SystemExit("Expected a run that ends by itself.")
    return startup


def differences(one, two):
    """Returns the differences between two run directories, as sentences."""
    found = []
    try:
        runs.assert_equal_states(runs.states(one), runs.states(two))
    except AssertionError as e:
        found.append(f"checkpoints: {e}")
    lines, expected = runs.lines(one), runs.lines(two)
    for mine, other in zip(lines, expected):
        if mine != other:
            found.append(f"metrics: {mine} instead of {other}")
            break
    if len(lines) != len(expected):
        found.append(f"metrics: {len(lines)} lines, not {len(expected)}")
    left = sorted(os.listdir(one / "checkpoints"))
    if left != sorted(os.listdir(two / "checkpoints")):
        found.append(f"files left behind: {', '.join(left)}")
    return found


def main(kills, seed, folder):
    # Killed processes leave TensorFlow's temporary files.
    os.environ["TMPDIR"] = str(folder)
    photos = write_folder(folder / "photos", each=PHOTOS_PER_CLASS)
    epochs = round(kills * EPOCHS_PER_KILL) + 2
    flags = [
        "--checkpoint_steps=1",
        "--log_steps=1",
        f"--total_epochs={epochs}",
    ]
    straight, killed = folder / "straight", folder / "killed"
    startup = undisturbed(runs.train(photos, straight, *flags), straight)
    rng = random.Random(seed)
    run = Run(
        runs.train(photos, killed, *flags),
        killed,
        steps_per_epoch=runs.lines(straight)[-1]["step"] // epochs,
        startup=startup,
        rng=rng,
    )
    places = collections.Counter()
    for number in range(kills):
        aim = AIMS[number % len(AIMS)]
        if 3 * places[CHECKPOINT] < number:  # earlier kills missed it
            aim = CHECKPOINT
        where = run.kill(aim)
        if where is None:
            print(f"The run was over after {number} kills.")
            return 1
        places[where] += 1
    runs.call(runs.train(photos, killed, *flags))
    found = differences(killed, straight)
    print(f"{kills} kills: {dict(places)}")
    if 3 * places[CHECKPOINT] < kills:
        found.append("fewer than every third kill hit a checkpoint")
    print("\n".join(found) or "Equal to the undisturbed run.")
    return 1 if found else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sys.exit(main(options.kills, options.seed, pathlib.Path(name)))
