"""Saving a run whole, and finding the newest state that can be read back."""

import os
import tempfile
import typing

import tensorflow as tf
from absl import logging

from clsa_tf import config as config_lib
from clsa_tf.errors import UserError, first_line
from clsa_tf.methods.base import make_encoder
from clsa_tf.networks.encoder import Encoder
from clsa_tf.strategy import LOST

# Within the run's directory.
DIRECTORY = "checkpoints"

# What TensorFlow has been seen to raise on files that are damaged, or written
# by another model.
_UNREADABLE = (
    tf.errors.OpError,
    AssertionError,
    LookupError,
    RuntimeError,
    ValueError,
)


class Checkpoints:
    """The newest checkpoints of a run.

    What is saved is all variables of the method (both networks, the queue and
    its pointer) and of the optimizer, whose `iterations` is the step and
    thereby the position in the data, which is a function of seed and step.

    Writing is atomic: TensorFlow writes under temporary names and renames, and
    only then points the file `checkpoint` at the new one.

    Args:
        method: compiled `Method` whose optimizer is built.
        workdir: directory of the run.
        keep: how many of the newest to keep.
        chief: whether this process writes; the others of its job have to take
            part in saving, too.

    Attributes:
        seconds: variable, seconds spent in training over all starts.
    """

    def __init__(self, method, workdir, *, keep, chief=True):
        """See the class."""
        self._method = method
        self._directory = os.path.join(workdir, DIRECTORY)
        self._chief = chief
        self._saved = None  # step of the newest good checkpoint
        self.seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        self._weights_are_finite = tf.function(
            lambda: tf.reduce_all(
                [
                    tf.reduce_all(tf.math.is_finite(v))
                    for v in method.trainable_variables
                ]
            )
        )
        self._checkpoint = tf.train.Checkpoint(
            method=method, optimizer=method.optimizer, seconds=self.seconds
        )
        self._manager = tf.train.CheckpointManager(
            self._checkpoint,
            self._directory,
            max_to_keep=keep,
            checkpoint_name="step",
        )

    @property
    def step(self):
        """Steps taken so far, int."""
        return int(self._method.steps_taken.numpy())

    @property
    def newest(self):
        """The newest good checkpoint, in words."""
        if self._saved is None:
            return "no checkpoint yet"
        return os.path.join(self._directory, f"step-{self._saved}")

    def save(self):
        """Writes the present state unless it is the newest one already.

        Raises:
            UserError: it cannot be written (disk full, no permission), or is
                not worth it: weights that are not finite.
        """
        if self._saved == self.step:
            return
        if not self._weights_are_finite():
            raise UserError(
                f"Expected finite weights, received others after step "
                f"{self.step}, which were not saved; the newest good "
                f"checkpoint is {self.newest}: lower --base_lr or raise the "
                "temperatures."
            )
        try:
            self._write()
        except LOST:
            raise
        except (tf.errors.OpError, OSError) as e:
            raise UserError(
                f"Expected to write the checkpoint of step {self.step} to "
                f"{self._directory}, received: {first_line(e)}; the newest "
                f"good one is {self.newest}: make room or fix the permissions, "
                "then start the same command again."
            ) from e
        self._saved = self.step

    def _write(self):
        if self._chief:
            self._manager.save(checkpoint_number=self.step)
            return
        # Batch statistics are averaged over all workers when they are read, so
        # that each has to read them, and TensorFlow reads to write.
        with tempfile.TemporaryDirectory() as unused:
            self._checkpoint.save(os.path.join(unused, "step"))

    def restore(self):
        """Restores the newest checkpoint that can be read; returns its step.

        A checkpoint that cannot be read is reported and passed over. Without
        any checkpoint nothing happens and the step is 0.

        Raises:
            UserError: there are checkpoints, and none of them can be read.
        """
        if not list_checkpoints(self._directory):
            return 0
        self._saved = _restore_newest(
            self._directory,
            lambda path: self._checkpoint.restore(
                path
            ).assert_existing_objects_matched(),
        )
        return self._saved


class Trained(typing.NamedTuple):
    """What evaluation and export need of a run."""

    config: config_lib.Config
    encoder: Encoder
    step: int  # at which it was saved
    seconds: float  # spent in training until then


def load_trained(workdir):
    """Reads the encoder of a run back from its newest readable checkpoint.

    Args:
        workdir: directory of the run.

    Returns:
        `Trained`.

    Raises:
        UserError: no run there, or no checkpoint that can be read.
    """
    config = config_lib.load(workdir)
    encoder = make_encoder(config, name="encoder")
    seconds = tf.Variable(0.0, dtype=tf.float64)
    # Only this part of what `Checkpoints` saves.
    reader = tf.train.Checkpoint(
        method=tf.train.Checkpoint(encoder=encoder), seconds=seconds
    )
    step = _restore_newest(
        os.path.join(workdir, DIRECTORY),
        lambda path: (
            reader.restore(path)
            .expect_partial()
            .assert_existing_objects_matched()
        ),
    )
    return Trained(config, encoder, step, float(seconds.numpy()))


def _restore_newest(directory, restore):
    """Calls `restore(path)` from the newest on until it works; its step."""
    paths = list_checkpoints(directory)
    for path in paths:
        try:
            restore(path)
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
        f"Expected a readable checkpoint in {directory}, received "
        f"{len(paths)} unreadable ones; restore one from a backup or start "
        "with another --workdir."
    )


def list_checkpoints(directory):
    """Paths of the checkpoints in `directory`, newest first.

    By their files, not by the `checkpoint` file: that may be damaged, too.
    """
    paths = [
        path[: -len(".index")]
        for path in tf.io.gfile.glob(os.path.join(directory, "step-*.index"))
    ]
    return sorted(paths, key=_step_of, reverse=True)


def _step_of(path):
    return int(path.rsplit("-", 1)[1])
