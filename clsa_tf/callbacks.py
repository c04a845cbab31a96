"""What happens beside the training steps: reporting, evaluating, saving.

Keras calls them in the order of the list, and order matters: what is logged at
a step is written before that step's checkpoint, so that a run that dies in
between neither loses a line nor writes it twice.
"""

import math
import sys
import time

import tensorflow as tf
import tqdm
from tensorflow import keras

from clsa_tf import metrics
from clsa_tf.errors import UserError

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
        seconds: variable that counts the seconds spent in training.
    """

    def __init__(
        self, workdir, step, *, config, steps_per_epoch, schedule, seconds
    ):
        """See the class."""
        super().__init__(step)
        self._workdir = workdir
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._schedule = schedule
        self._seconds = seconds
        self._writer = tf.summary.create_file_writer(f"{workdir}/tensorboard")
        self._shown = {}
        self._bar = None
        # Of the next line: step before it, seconds of training so far, and
        # since when the clock runs (not during evaluation and saving).
        self._from_step = step
        self._elapsed = 0.0
        self._since = 0.0

    def on_train_begin(self, logs=None):
        """Opens the bar."""
        total = self._config.total_epochs * self._steps_per_epoch
        self._bar = tqdm.tqdm(
            total=total * self._config.batch_size,
            initial=self.step * self._config.batch_size,
            unit="images",
            unit_scale=True,
            dynamic_ncols=True,
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
        self._bar.close()

    def after_step(self, logs):
        """Moves the bar; every `log_steps` reads and writes the reports."""
        last = self.step == self._config.total_epochs * self._steps_per_epoch
        if self.step % self._config.log_steps == 0 or last:
            values = {k: float(v) for k, v in logs.items()}
            self._check(values)
            self._tick()
            images = (self.step - self._from_step) * self._config.batch_size
            values["lr"] = float(self._schedule(self.step - 1))
            values["images_per_second"] = images / self._elapsed
            self._from_step, self._elapsed = self.step, 0.0
            self.write(values)
        self._bar.update(self._config.batch_size)

    def write(self, values):
        """Writes one line of values at the present step, and shows them."""
        epoch = self.step / self._steps_per_epoch
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
        with self._writer.as_default(self.step):
            tf.summary.image(name, image[tf.newaxis])

    def _tick(self):
        now = time.perf_counter()
        self._elapsed += now - self._since
        self._seconds.assign_add(now - self._since)
        self._since = now

    def _check(self, values):
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"Expected a finite loss, received {values['loss']} at step "
                f"{self.step} with learning rate "
                f"{float(self._schedule(self.step - 1)):.3g}; lower --base_lr "
                "or raise the temperatures."
            )


class Monitor(StepCallback):
    """Evaluates the encoder after every `every` epochs.

    Args:
        log: the `Log` that the result is written to.
        task: the `KnnTask`.
        encode: compiled function, images -> features, see `KnnTask.features`.
        every: epochs.
    """

    def __init__(self, log, task, encode, *, every):
        """See the class."""
        super().__init__(log.step)
        self._log = log
        self._task = task
        self._encode = encode
        self._every = every

    def on_epoch_end(self, epoch, logs=None):
        """Evaluates and writes."""
        if (epoch + 1) % self._every == 0:
            self._log.write({"knn": self._task.accuracy(self._encode)})


class Save(StepCallback):
    """Saves a checkpoint after every `every` steps and after every epoch.

    Args:
        checkpoints: `Checkpoints`.
        step: steps taken before.
        every: steps; 0 for none but at the end of an epoch.
        steps_per_epoch: int.
    """

    def __init__(self, checkpoints, step, *, every, steps_per_epoch):
        """See the class."""
        super().__init__(step)
        self._checkpoints = checkpoints
        self._every = every
        self._steps_per_epoch = steps_per_epoch

    def after_step(self, logs):
        """Saves within an epoch."""
        if self._every and self.step % self._every == 0:
            # At the end of an epoch the evaluation comes first.
            if self.step % self._steps_per_epoch:
                self._checkpoints.save()

    def on_epoch_end(self, epoch, logs=None):
        """Saves at the end of an epoch."""
        self._checkpoints.save()
