"""Saves the complete state of a run, and reads the newest one back."""

import contextlib
import math
import os
import re
import shutil
import tempfile
import typing

import tensorflow as tf
from absl import logging

from clsa_tf import config as config_lib
from clsa_tf import files
from clsa_tf.distributed.strategy import is_lost_worker
from clsa_tf.errors import UserError, first_line
from clsa_tf.networks.encoder import Encoder, make_encoder
from clsa_tf.training import metrics_log
from clsa_tf.training.workdir import images as images_of

# Directory of the checkpoints within the run's directory, and the one within it
# for checkpoints that are being written.
DIRECTORY = "checkpoints"
UNFINISHED = "unfinished"

# Raised by TensorFlow for damaged files, or files of another model.
_UNREADABLE = (
    tf.errors.OpError,
    AssertionError,
    LookupError,
    RuntimeError,
    ValueError,
)
# Causes that say nothing about the file.
_TEMPORARY = (tf.errors.ResourceExhaustedError, tf.errors.UnavailableError)


class Checkpoints:
    """Writes and restores the checkpoints of a run.

    A checkpoint holds all variables of the method (both networks, the queue
    and its pointer) and of the optimizer. The step is one of them. It also
    determines the position in the data, a function of seed and step.

    Writing is atomic. Files are written to a separate directory, flushed to
    the disk and moved, the index last. Files that a killed process left in the
    separate directory are removed before the next checkpoint is written.

    Args:
        method: compiled `Method` whose optimizer is built.
        workdir: directory of the run.
        keep: number of newest checkpoints to keep.
        schedule: function of the step that returns the learning rate, for
            messages; None: messages do not mention it.
        chief: whether this process writes. The other processes of the job must
            call `save`, too.

    Attributes:
        seconds: variable, seconds spent in training over all starts.
    """

    def __init__(self, method, workdir, *, keep, schedule=None, chief=True):
        """See the class."""
        self._method = method
        self._workdir = workdir
        self._directory = os.path.join(workdir, DIRECTORY)
        self._keep = keep
        self._schedule = schedule
        self._chief = chief
        self._saved = None  # step of the newest good checkpoint
        self.seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        # Batch statistics and queue, too, which may overflow before weights do.
        numbers = [v for v in method.variables if v.dtype.is_floating]
        self._weights_are_finite = tf.function(
            lambda: tf.reduce_all(
                [tf.reduce_all(tf.math.is_finite(v)) for v in numbers]
            )
        )
        self._checkpoint = tf.train.Checkpoint(
            method=method, optimizer=method.optimizer, seconds=self.seconds
        )

    @property
    def step(self):
        """Steps taken so far, int."""
        return int(self._method.steps_taken.numpy())

    @property
    def newest(self):
        """A clause about the newest good checkpoint, for messages."""
        if self._saved is None:
            return "there is no checkpoint yet"
        path = os.path.join(self._directory, f"step-{self._saved}")
        return f"the newest good checkpoint is {path}"

    def save(self):
        """Writes the current state, unless it is already saved.

        Raises:
            UserError: it cannot be written (disk full, no permission), or
                weights are not finite.
        """
        if self._saved == self.step:
            return
        if not self._weights_are_finite():
            rate = self._schedule and float(self._schedule(self.step - 1))
            raise UserError(
                f"Expected finite weights, received NaN or infinity after step "
                f"{self.step}"
                + (f" with learning rate {rate:.3g}" if rate else "")
                + f", which were not saved; {self.newest}: lower --base_lr or "
                "raise the temperatures."
            )
        try:
            self._write()
        except (tf.errors.OpError, OSError) as e:
            if is_lost_worker(e):
                raise
            self._remove_incomplete()
            raise UserError(
                f"Cannot write the checkpoint of step {self.step} to "
                f"{self._directory}: {first_line(e)}; {self.newest}: "
                "make room or fix the permissions, then start the same command "
                "again."
            ) from e
        self._saved = self.step

    def _write(self):
        if not self._chief:
            # Reading batch statistics averages them over all workers, so
            # every worker has to read them. Writing does that.
            with tempfile.TemporaryDirectory() as unused:
                self._checkpoint.write(os.path.join(unused, "step"))
            return
        self._remove_unfinished()
        folder = os.path.join(self._directory, UNFINISHED)
        self._checkpoint.write(os.path.join(folder, f"step-{self.step}"))
        # "step-5.data-00000-of-00001" comes before "step-5.index".
        for name in sorted(os.listdir(folder)):
            files.publish(
                os.path.join(folder, name), os.path.join(self._directory, name)
            )
        os.rmdir(folder)
        self._remove_old(self.step)

    def _remove_old(self, step):
        """Removes the checkpoints up to `step` except the newest."""
        for path in list_checkpoints(self._directory, step)[self._keep :]:
            # The index first: without its index, a data file is not a
            # checkpoint.
            os.remove(path + ".index")
        self._remove_data_without_index()

    def _remove_data_without_index(self):
        complete = set(list_checkpoints(self._directory))
        for path, suffix in _files(self._directory):
            if suffix.startswith(".data-") and path not in complete:
                os.remove(path + suffix)

    def _remove_incomplete(self):
        """Removes the files of a checkpoint that was not completed."""
        with contextlib.suppress(OSError):
            # Data files that were already moved come first. Once their index
            # is removed, they would look like a checkpoint whose index is
            # lost.
            self._remove_data_without_index()
        self._remove_unfinished()

    def _remove_unfinished(self):
        folder = os.path.join(self._directory, UNFINISHED)
        shutil.rmtree(folder, ignore_errors=True)

    def restore(self):
        """Restores the newest readable checkpoint.

        Unreadable checkpoints are reported and skipped.

        Returns:
            step of the checkpoint; 0 if there is no checkpoint.

        Raises:
            UserError: no checkpoint is readable, or there is none although
                there has been one.
        """
        if not list_checkpoints(self._directory):
            if _traces(self._workdir):
                raise UserError(_lost(self._workdir))
            if self._chief:
                self._remove_incomplete()
            return 0
        self._saved = _restore_newest(
            self._workdir,
            lambda path: self._checkpoint.read(
                path
            ).assert_existing_objects_matched(),
        )
        return self._saved


class Trained(typing.NamedTuple):
    """State of a run for evaluation and export."""

    config: config_lib.Config
    encoder: Encoder
    step: int  # of the checkpoint
    seconds: float  # spent in training until that step


def load_trained(workdir, *, precision="float32"):
    """Reads the encoder of a run from its newest readable checkpoint.

    Args:
        workdir: directory of the run.
        precision: precision of the encoder, see `clsa_tf.networks.precision`.
            Its variables are always float32.

    Returns:
        `Trained`.

    Raises:
        UserError: there is no run, or it has no readable checkpoint.
    """
    config = config_lib.load(workdir)
    encoder = make_encoder(config, name="encoder", precision=precision)
    seconds = tf.Variable(0.0, dtype=tf.float64)
    # Part of the objects that `Checkpoints` saves.
    reader = tf.train.Checkpoint(
        method=tf.train.Checkpoint(encoder=encoder), seconds=seconds
    )
    step = _restore_partly(reader, workdir)
    return Trained(config, encoder, step, float(seconds.numpy()))


def restore_method(method, workdir):
    """Reads all variables of a method from a run's newest readable checkpoint.

    Args:
        method: `Method` made from the `Config` of that run.
        workdir: directory of the run.

    Returns:
        step of the checkpoint.

    Raises:
        UserError: the run has no readable checkpoint.
    """
    return _restore_partly(tf.train.Checkpoint(method=method), workdir)


def newest_step(workdir):
    """Step of the newest checkpoint of the run in `workdir`; 0: none."""
    paths = list_checkpoints(os.path.join(workdir, DIRECTORY))
    return _step_of(paths[0]) if paths else 0


def _restore_partly(reader, workdir):
    directory = os.path.join(workdir, DIRECTORY)
    if not list_checkpoints(directory):
        raise UserError(
            _lost(workdir) if _traces(workdir) else _not_yet(workdir)
        )
    return _restore_newest(
        workdir,
        lambda each: (
            reader.read(each).expect_partial().assert_existing_objects_matched()
        ),
    )


def _restore_newest(workdir, restore):
    """Calls `restore(path)`, newest checkpoint first, until one succeeds.

    Returns:
        step of that checkpoint.

    Raises:
        UserError: all calls failed.
    """
    directory = os.path.join(workdir, DIRECTORY)
    paths = list_checkpoints(directory)
    for path in paths:
        try:
            restore(path)
        except _TEMPORARY:
            raise
        except _UNREADABLE as e:
            logging.warning(
                "Checkpoint %s cannot be read (%s); falling back to the one "
                "before.",
                path,
                first_line(e),
            )
            continue
        return _step_of(path)
    raise UserError(
        f"Expected a readable checkpoint in {directory}, received only "
        f"{len(paths)} unreadable ones; restore one from a backup or start "
        "with another --workdir." + config_lib.written_by(workdir)
    )


def _traces(workdir):
    """Looks for traces of checkpoints in a run that has none.

    Returns:
        str, the trace in words; "" if there is none, as in a run that was
        killed before its first checkpoint.
    """
    directory = os.path.join(workdir, DIRECTORY)
    # Checkpoints that were being moved when the process was killed. Their
    # index, which is moved last, is still here.
    unfinished = {
        os.path.basename(name)
        for name, suffix in _files(os.path.join(directory, UNFINISHED))
        if suffix == ".index"
    }
    for name, suffix in _files(directory):
        step = os.path.basename(name)
        if suffix.startswith(".data-") and step not in unfinished:
            return f"{step}{suffix} without its index"
    # The run is saved at the end of each epoch.
    entries = metrics_log.read(workdir)
    if any(e.get("epoch", 0) > 1 or "knn" in e for e in entries):
        return f"{metrics_log.FILE} up to step {entries[-1]['step']}"
    return ""


def _lost(workdir):
    directory = os.path.join(workdir, DIRECTORY)
    return (
        f"Expected a checkpoint in {directory}, received none, although the "
        f"run has saved one ({_traces(workdir)}); restore the files from a "
        f"backup, choose another --workdir, or delete {workdir} to start again "
        "at step 0." + config_lib.written_by(workdir)
    )


def _not_yet(workdir):
    config, images = config_lib.load(workdir), images_of(workdir)
    epoch = images and config.steps_per_epoch(images)
    if config.checkpoint_steps and config.checkpoint_steps <= (epoch or 1):
        first = f"after {config.checkpoint_steps} steps"
    else:
        first = "after the first epoch" + (f", {epoch} steps" if epoch else "")
    directory = os.path.join(workdir, DIRECTORY)
    return (
        f"Expected a checkpoint in {directory}, received none: the run has not "
        f"written any yet and writes the first {first}; continue it with "
        "`python -m clsa_tf.train "
        f"--flagfile={os.path.join(workdir, config_lib.RUN_FLAGS)} "
        f"--workdir={workdir}`."
    )


def list_checkpoints(directory, last=math.inf):
    """Paths of the checkpoints in `directory`, newest first.

    Args:
        directory: directory of the checkpoints; it need not exist.
        last: largest step of the checkpoints to return.
    """
    paths = {
        path
        for path, suffix in _files(directory)
        if suffix == ".index" and _step_of(path) <= last
    }
    return sorted(paths, key=_step_of, reverse=True)


def _files(directory):
    """Files of checkpoints, list of (path of the checkpoint, suffix)."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    found = (re.fullmatch(r"(step-\d+)(\..*)", name) for name in names)
    return [
        (os.path.join(directory, match[1]), match[2])
        for match in found
        if match
    ]


def _step_of(path):
    return int(path.rsplit("-", 1)[1])
