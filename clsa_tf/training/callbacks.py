"""Keras callbacks that log, save and evaluate.

Keras calls them in the order of the list, which matters. Metrics of a step are
written before its checkpoint, so a run that dies in between neither loses a
line nor writes it twice. The evaluation comes after the checkpoint, so a run
that dies while it evaluates repeats the evaluation, not the epoch.

With several workers, every worker calls every callback, because reading a
variable may be a collective operation. Only the chief writes.
"""

import contextlib
import math
import sys
import time

import tensorflow as tf
from absl import logging
from tensorflow import keras

from clsa_tf.errors import Stopped, UserError, first_line
from clsa_tf.terminal import progress
from clsa_tf.training import metrics_log

# Metrics that the progress bar shows, with their short names.
_SHOWN = {
    "loss": "loss",
    "ddm": "ddm",
    "contrast_accuracy": "acc",
    "knn": "kNN",
}


class StepCallback(keras.callbacks.Callback):
    """A callback that counts the steps itself, without reading the device.

    Args:
        step: steps taken before.

    Attributes:
        step: steps taken so far.
    """

    # Otherwise Keras copies all metrics off the device at every step.
    _supports_tf_logs = True

    def __init__(self, step):
        """See the class."""
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        """Counts the step, then calls `after_step`."""
        self.step += 1
        self.after_step(logs)

    def after_step(self, logs):
        """Called after every step; `logs` holds the metrics of that step."""


class Log(StepCallback):
    """Writes the progress bar, `metrics.jsonl` and TensorBoard.

    Args:
        config: `Config`.
        step: steps taken before.
        steps_per_epoch: int.
        schedule: function of the step that returns the learning rate.
        checkpoints: `Checkpoints`.
        watch: `collapse.Watch`.
        chief: whether this process writes and prints.
    """

    def __init__(
        self,
        config,
        step,
        *,
        steps_per_epoch,
        schedule,
        checkpoints,
        watch,
        chief=True,
    ):
        """See the class."""
        super().__init__(step)
        self._config = config
        self.steps_per_epoch = steps_per_epoch
        self._schedule = schedule
        self._checkpoints = checkpoints
        self._watch = watch
        self.chief = chief
        if chief:
            with self._writing():
                self._writer = tf.summary.create_file_writer(
                    f"{config.workdir}/{metrics_log.TENSORBOARD}"
                )
        self._shown = {}
        self._unchecked = None  # the last step and its loss
        self._bar = None
        self._compiling = contextlib.ExitStack()
        # For the next entry: the step of the entry before, the seconds of
        # training since then, and when the clock was started. The clock stops
        # during evaluation and saving.
        self._from_step = step
        self._elapsed = 0.0
        self._since = 0.0

    def begin(self):
        """Shows that the first step, which takes long, is in progress."""
        if self.chief:
            what = "compiling the training step and taking the first one"
            self._compiling.enter_context(progress.waiting(what))

    def _open_bar(self):
        """Opens the bar after the first step, which is much slower."""
        total = self._config.total_epochs * self.steps_per_epoch
        self._compiling.close()
        self._bar = progress.bar(
            total * self._config.batch_size,
            initial=self.step * self._config.batch_size,
            unit="images",
            shown=self.chief,
            optional=("ddm", "epoch"),
        )

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self._since = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Stops the clock."""
        self._tick()

    def close(self):
        """Closes the bar and TensorBoard's file."""
        self._compiling.close()
        if self._bar is not None:
            self._bar.close()
        if self.chief:
            try:
                self._writer.close()
            except (tf.errors.OpError, OSError) as e:
                # Not raised: it would replace the error that ended the run.
                logging.warning(
                    "TensorBoard's file lacks the last steps (%s); they are "
                    "in %s.",
                    first_line(e),
                    metrics_log.FILE,
                )

    def doing(self, what):
        """Context manager in which the chief shows a text.

        Args:
            what: the text, such as "evaluating".
        """
        if not self.chief:
            return contextlib.nullcontext()
        if self._bar is None:
            return progress.waiting(what)
        return self._bar.doing(what)

    def after_step(self, logs):
        """Moves the bar; writes the metrics every `--log_steps` steps."""
        if self._bar is None:
            self._open_bar()
        else:
            self._bar.update(self._config.batch_size)
        # Checks the loss of the step before. The host would have to wait for
        # that of this step.
        self.check()
        self._unchecked = self.step, logs["loss"]
        last = self.step == self._config.total_epochs * self.steps_per_epoch
        if self.step % self._config.log_steps == 0 or last:
            self.check()
            values = {name: float(value) for name, value in logs.items()}
            self._tick()
            images = (self.step - self._from_step) * self._config.batch_size
            values["lr"] = float(self._schedule(self.step - 1))
            values["images_per_second"] = images / self._elapsed
            self._from_step, self._elapsed = self.step, 0.0
            self.write(values)
            self._print(self._watch.words(self.step, values))

    def write(self, values):
        """Writes a dict of values of the current step, and shows them."""
        if not self.chief:
            return
        epoch = self.step / self.steps_per_epoch
        with self._writing():
            metrics_log.append(
                self._config.workdir,
                {"step": self.step, "epoch": round(epoch, 4)} | values,
            )
            with self._writer.as_default(self.step):
                for name, value in values.items():
                    tf.summary.scalar(name, value)
        for name, short in _SHOWN.items():
            if name in values:
                self._shown[short] = f"{values[name]:.3f}"
        if self._bar is not None:
            self._bar.set_values({"epoch": f"{epoch:.1f}"} | self._shown)

    def has(self, name):
        """Whether the value `name` was written at the current step."""
        entries = metrics_log.read(self._config.workdir)
        return any(e["step"] == self.step and name in e for e in entries)

    def picture(self, name, image):
        """Writes an image, uint8 `[H, W, 3]`, for TensorBoard."""
        if not self.chief:
            return
        with self._writing(), self._writer.as_default(self.step):
            tf.summary.image(name, image[tf.newaxis])

    @contextlib.contextmanager
    def _writing(self):
        """Context manager that turns write errors into a `UserError`."""
        try:
            yield
        except (tf.errors.OpError, OSError) as e:
            raise UserError(
                f"Cannot write the metrics to {self._config.workdir}: "
                f"{first_line(e)}; {self._checkpoints.newest}: make room or "
                "fix the permissions, then start the same command again."
            ) from e

    def flush(self):
        """Writes TensorBoard's buffered events to the disk."""
        with self._writing():
            self._writer.flush()

    def _print(self, words):
        if words and self.chief:
            self._bar.write(words, file=sys.stderr)

    def _tick(self):
        now = time.perf_counter()
        self._elapsed += now - self._since
        self._checkpoints.seconds.assign_add(now - self._since)
        self._since = now

    def check(self):
        """Raises `UserError` unless the latest loss is finite."""
        if self._unchecked is None:
            return
        step, loss = self._unchecked[0], float(self._unchecked[1])
        self._unchecked = None
        if not math.isfinite(loss):
            raise UserError(
                f"Expected a finite loss, received {loss} at step {step} with "
                f"learning rate {float(self._schedule(step - 1)):.3g}; "
                f"{self._checkpoints.newest}: lower --base_lr or raise the "
                "temperatures."
            )


class Save(StepCallback):
    """Saves every `every` steps, after every epoch, and before stopping.

    Args:
        checkpoints: `Checkpoints`.
        log: the `Log` that checks the loss.
        every: number of steps; 0: only at the end of an epoch.
        stop_signal: function of the steps taken that returns the number of the
            signal that asks to stop, or 0 to continue.
    """

    def __init__(self, checkpoints, log, *, every, stop_signal):
        """See the class."""
        super().__init__(log.step)
        self._checkpoints = checkpoints
        self._log = log
        self._every = every
        self._stop_signal = stop_signal

    def after_step(self, logs):
        """Saves if a checkpoint is due; raises `Stopped` after a signal."""
        number = self._stop_signal(self.step)
        due = self._every and self.step % self._every == 0
        # At the end of an epoch `on_epoch_end` saves.
        if number or (due and self.step % self._log.steps_per_epoch):
            self._save()
        if number:
            raise Stopped(number)

    def on_epoch_end(self, epoch, logs=None):
        """Saves at the end of an epoch."""
        self._save()

    def _save(self):
        self._log.check()
        self._checkpoints.save()


class EpochBegin(StepCallback):
    """Calls `Method.on_epoch_begin` with features of the whole dataset.

    A run that resumes within an epoch finds the results in its checkpoint. The
    epoch before is saved, so a run that is stopped here repeats the call with
    the same weights.

    Args:
        log: `Log`.
        method: the `Method`.
        dataset_features: `DatasetFeatures`.
        interruption: `Interruption`; a signal cancels the call. None: it does
            not, because several workers stop together.
    """

    def __init__(self, log, method, dataset_features, *, interruption):
        """See the class."""
        super().__init__(log.step)
        self._log = log
        self._method = method
        self._features = dataset_features
        self._interruption = interruption

    def on_epoch_begin(self, epoch, logs=None):
        """Calls the method, except when resuming within an epoch."""
        if self.step % self._log.steps_per_epoch:
            return
        with self._log.doing("preparing the epoch"), self._leaving():
            self._method.on_epoch_begin(epoch, self._features.once())

    def _leaving(self):
        if self._interruption is None:
            return contextlib.nullcontext()
        if self._log.chief:
            self._log.flush()
        return self._interruption.at_once(
            "stopping; the next start repeats the pass over the dataset"
        )


class Monitor(StepCallback):
    """Evaluates the encoder every `every` epochs, and at the end.

    Args:
        log: `Log` that writes the result.
        task: `Task`.
        snapshot: `Snapshot` of the encoder.
        every: number of epochs.
        last: number of epochs of the run.
        interruption: `Interruption`; a signal cancels an evaluation.
    """

    def __init__(self, log, task, snapshot, *, every, last, interruption):
        """See the class."""
        super().__init__(log.step)
        self._log = log
        self._task = task
        self._snapshot = snapshot
        self._every = every
        self._last = last
        self._interruption = interruption

    def catch_up(self):
        """Evaluates if the run ended between saving and evaluating."""
        epochs, within = divmod(self.step, self._log.steps_per_epoch)
        if self.step and not within and self._is_due(epochs):
            self._evaluate()

    def on_epoch_end(self, epoch, logs=None):
        """Evaluates and writes the accuracy, if it is due."""
        if self._is_due(epoch + 1):
            self._evaluate()

    def _is_due(self, epochs):
        """Whether to evaluate after this number of epochs."""
        return epochs % self._every == 0 or epochs == self._last

    def _evaluate(self):
        self._snapshot.take()  # a collective of all workers
        if self._log.chief and not self._log.has("knn"):
            what = "leaving the evaluation, which the next start repeats"
            self._log.flush()
            with (
                self._log.doing("evaluating"),
                self._interruption.at_once(what),
            ):
                accuracy = self._task.accuracy(self._snapshot.features)
            self._log.write({"knn": accuracy})
