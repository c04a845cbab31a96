"""What happens beside the training steps: reporting, saving, evaluating.

Keras calls them in the order of the list, and order matters: what is logged at
a step is written before that step's checkpoint, so that a run that dies in
between neither loses a line nor writes it twice. Evaluation comes after it: a
run that dies while it evaluates repeats the evaluation, not the epoch.

With several workers all of them call everything, since reading a variable may
take all of them; only the chief writes.
"""

import contextlib
import math
import sys
import time

import tensorflow as tf
import tqdm
from tensorflow import keras

from clsa_tf import collapse, metrics
from clsa_tf.errors import Stopped, UserError, first_line

# Reports shown in the progress bar, with their short names.
_SHOWN = {
    "loss": "loss",
    "ddm": "ddm",
    "contrast_accuracy": "acc",
    "knn": "kNN",
}


class StepCallback(keras.callbacks.Callback):
    """A callback that knows the step without asking the accelerator.

    Args:
        step: steps taken before.
    """

    # Keras otherwise copies every report off the device at every step.
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
        """Called with `self.step` steps taken and the last one's reports."""


class Log(StepCallback):
    """Progress bar, `metrics.jsonl` and TensorBoard.

    Args:
        workdir: directory of the run.
        step: steps taken before.
        config: `Config`.
        steps_per_epoch: int.
        schedule: step -> learning rate.
        checkpoints: `Checkpoints`.
        watch: `collapse.Watch`.
        chief: whether this process writes and shows anything.
    """

    def __init__(
        self,
        workdir,
        step,
        *,
        config,
        steps_per_epoch,
        schedule,
        checkpoints,
        watch,
        chief=True,
    ):
        """See the class."""
        super().__init__(step)
        self._workdir = workdir
        self._config = config
        self.steps_per_epoch = steps_per_epoch
        self._schedule = schedule
        self._checkpoints = checkpoints
        self._watch = watch
        self._chief = chief
        if chief:
            with self._writing():
                self._writer = tf.summary.create_file_writer(
                    f"{workdir}/tensorboard"
                )
        self._shown = {}
        self._unchecked = None  # the last step and its loss
        self._bar = None
        # Of the next line: step before it, seconds of training so far, and
        # since when the clock runs (not during evaluation and saving).
        self._from_step = step
        self._elapsed = 0.0
        self._since = 0.0

    def on_train_begin(self, logs=None):
        """Opens the bar."""
        total = self._config.total_epochs * self.steps_per_epoch
        self._bar = tqdm.tqdm(
            total=total * self._config.batch_size,
            initial=self.step * self._config.batch_size,
            unit="images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not self._chief,
            # In a log file: a line every so often instead of a moving bar.
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            bar_format="{l_bar}{bar:12}| {elapsed}<{remaining}, "
            "{rate_fmt}{postfix}",
        )

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self._since = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Stops the clock."""
        self._tick()

    def on_train_end(self, logs=None):
        """Closes the bar."""
        self.close()

    def close(self):
        """Ends the line of the bar; a run that fails has to do it itself."""
        if self._bar is not None:
            self._bar.close()

    def after_step(self, logs):
        """Moves the bar; every `log_steps` reads and writes the reports."""
        # The loss of the step before: to read this one's would make the host
        # wait for it.
        self.check()
        self._unchecked = self.step, logs["loss"]
        last = self.step == self._config.total_epochs * self.steps_per_epoch
        if self.step % self._config.log_steps == 0 or last:
            self.check()
            values = collapse.summary(
                {k: float(v) for k, v in logs.items()},
                dimension=self._config.options.projection_size,
            )
            self._tick()
            images = (self.step - self._from_step) * self._config.batch_size
            values["lr"] = float(self._schedule(self.step - 1))
            values["images_per_second"] = images / self._elapsed
            self._from_step, self._elapsed = self.step, 0.0
            self.write(values)
            self._tell(self._watch.words(self.step, values))
        self._bar.update(self._config.batch_size)

    def write(self, values):
        """Writes one line of values at the present step, and shows them."""
        if not self._chief:
            return
        epoch = self.step / self.steps_per_epoch
        with self._writing():
            metrics.append(
                self._workdir,
                {"step": self.step, "epoch": round(epoch, 4)} | values,
            )
            with self._writer.as_default(self.step):
                for name, value in values.items():
                    tf.summary.scalar(name, value)
        for name, short in _SHOWN.items():
            if name in values:
                self._shown[short] = f"{values[name]:.3f}"
        if self._bar is not None:
            self._bar.set_postfix(
                {"epoch": f"{epoch:.1f}"} | self._shown, refresh=False
            )

    def picture(self, name, image):
        """Shows uint8 `[H, W, 3]` in TensorBoard."""
        if not self._chief:
            return
        with self._writing(), self._writer.as_default(self.step):
            tf.summary.image(name, image[tf.newaxis])

    @contextlib.contextmanager
    def _writing(self):
        """Says in a sentence that something could not be written."""
        try:
            yield
        except (tf.errors.OpError, OSError) as e:
            raise UserError(
                f"Expected to write what is measured to {self._workdir}, "
                f"received: {first_line(e)}; the newest good checkpoint is "
                f"{self._checkpoints.newest}: make room or fix the "
                "permissions, then start the same command again."
            ) from e

    def _tell(self, words):
        if words and self._chief:
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
                f"learning rate {float(self._schedule(step - 1)):.3g}; the "
                f"newest good checkpoint is {self._checkpoints.newest}: lower "
                "--base_lr or raise the temperatures."
            )


class Monitor(StepCallback):
    """Evaluates the encoder after every `every` epochs.

    Args:
        log: the `Log` that the result is written to.
        task: the `KnnTask`.
        encoder: the `Encoder` to evaluate.
        copy: another one, without strategy, that is evaluated in its place.
        encode: compiled function of `copy`, images -> features, see
            `KnnTask.features`.
        every: epochs.
        steps_per_epoch: int.
        interruption: `Interruption`, which need not wait for an evaluation.
        evaluated: steps at which the run was evaluated before.
        chief: whether this process evaluates.
    """

    def __init__(
        self,
        log,
        task,
        encoder,
        copy,
        encode,
        *,
        every,
        steps_per_epoch,
        interruption,
        evaluated,
        chief=True,
    ):
        """See the class."""
        super().__init__(log.step)
        self._log = log
        self._task = task
        self._encoder = encoder
        self._copy = copy
        self._encode = encode
        self._every = every
        self._steps_per_epoch = steps_per_epoch
        self._interruption = interruption
        self._evaluated = evaluated
        self._chief = chief

    def catch_up(self):
        """Evaluates if the run was stopped between saving and evaluating."""
        if self.step and self.step % (self._every * self._steps_per_epoch) == 0:
            self._evaluate()

    def on_epoch_end(self, epoch, logs=None):
        """Evaluates and writes."""
        if (epoch + 1) % self._every == 0:
            self._evaluate()

    def _evaluate(self):
        for variable, source in zip(
            self._copy.variables, self._encoder.variables
        ):
            variable.assign(source)
        if self._chief and self.step not in self._evaluated:
            with self._interruption.at_once():
                accuracy = self._task.accuracy(self._encode)
            self._log.write({"knn": accuracy})


class Save(StepCallback):
    """Saves a checkpoint after every `every` steps and after every epoch.

    Args:
        checkpoints: `Checkpoints`.
        log: the `Log` that checks the loss.
        every: steps; 0 for none but at the end of an epoch.
        steps_per_epoch: int.
    """

    def __init__(self, checkpoints, log, *, every, steps_per_epoch):
        """See the class."""
        super().__init__(log.step)
        self._checkpoints = checkpoints
        self._log = log
        self._every = every
        self._steps_per_epoch = steps_per_epoch

    def after_step(self, logs):
        """Saves within an epoch."""
        if self._every and self.step % self._every == 0:
            # The end of an epoch has a call of its own.
            if self.step % self._steps_per_epoch:
                self._save()

    def on_epoch_end(self, epoch, logs=None):
        """Saves at the end of an epoch."""
        self._save()

    def _save(self):
        self._log.check()
        self._checkpoints.save()


class Stop(StepCallback):
    """Saves and stops after the step in which a signal came.

    Args:
        checkpoints: `Checkpoints`.
        log: the `Log` that checks the loss.
        interruption: `Interruption`.
        any_worker: function from this worker's signal (0: none) to that of
            any worker; it is called every `every` steps.
        every: steps.
    """

    def __init__(self, checkpoints, log, interruption, any_worker, *, every):
        """See the class."""
        super().__init__(log.step)
        self._checkpoints = checkpoints
        self._log = log
        self._interruption = interruption
        self._any_worker = any_worker
        self._every = every

    def after_step(self, logs):
        """Saves and raises `Stopped` if it is time."""
        if self.step % self._every:
            return
        number = self._any_worker(self._interruption.signal)
        if number:
            self._log.check()
            self._checkpoints.save()
            raise Stopped(number)
