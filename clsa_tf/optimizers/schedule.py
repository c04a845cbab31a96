"""The learning-rate schedule."""

import math

import tensorflow as tf
from tensorflow import keras

from clsa_tf.errors import UserError

SCHEDULES = ("cosine", "steps", "constant")


LR_PER = ("epoch", "step")


# --lr_scaling -> factor on --base_lr for a global batch.
LR_SCALINGS = {
    "linear": lambda batch_size: batch_size / 256,
    "sqrt": math.sqrt,
    "none": lambda batch_size: 1.0,
}


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate: linear warm-up from 0 per step, then one of `SCHEDULES`.

    After e of E epochs, with a warm-up of W epochs:

        cosine:    lr = peak * (1 + cos(pi (e - W) / (E - W))) / 2
        steps:     lr = peak * 0.1 ** (number of milestones <= e)
        constant:  lr = peak

    Args:
        peak: learning rate after the warm-up.
        steps_per_epoch: steps per epoch.
        total_epochs: E.
        shape: one of `SCHEDULES`.
        per: `"epoch"` if the e of the cosine is a whole number, `"step"` if it
            includes fractions of an epoch.
        warmup_epochs: W, in [0, E).
        milestones: increasing whole epochs, for `"steps"`.

    Source: `adjust_learning_rate` of maple-research-lab/CLSA@37df76c (cosine
    per epoch) and facebookresearch/moco@7397dfe (steps);
    `WarmUpAndCosineDecay` of google-research/simclr.
    """

    def __init__(
        self,
        peak,
        *,
        steps_per_epoch,
        total_epochs,
        shape="cosine",
        per="epoch",
        warmup_epochs=0.0,
        milestones=(),
    ):
        """See the class."""
        self.peak = peak
        self.steps_per_epoch = steps_per_epoch
        self.total_epochs = total_epochs
        self.shape = shape
        self.per = per
        self.warmup_epochs = warmup_epochs
        self.milestones = milestones

    def __call__(self, step):
        """Learning rate, float32 scalar, at `step` (from 0)."""
        step = tf.cast(step, tf.int64)
        epoch = step // self.steps_per_epoch
        exact_epoch = tf.cast(step, tf.float32) / self.steps_per_epoch
        if self.shape == "cosine":
            rate = self._cosine(epoch if self.per == "epoch" else exact_epoch)
        elif self.shape == "steps":
            passed = [tf.cast(epoch >= m, tf.float32) for m in self.milestones]
            rate = self.peak * 0.1 ** tf.add_n(passed)
        else:
            rate = tf.constant(self.peak, tf.float32)
        if not self.warmup_epochs:
            return rate
        share = exact_epoch / self.warmup_epochs
        return tf.where(share < 1.0, self.peak * share, rate)

    def _cosine(self, epoch):
        past = tf.cast(epoch, tf.float32) - self.warmup_epochs
        # The warm-up may end within an epoch; `past` is then negative at the
        # start of that epoch.
        share = tf.maximum(past, 0.0) / (self.total_epochs - self.warmup_epochs)
        return self.peak * 0.5 * (1.0 + tf.cos(math.pi * share))

    def get_config(self):
        """Returns the constructor arguments, for Keras."""
        return dict(vars(self))


def make_schedule(config, steps_per_epoch):
    """Returns the `Schedule` of `config`, a `clsa_tf.config.Config`."""
    return Schedule(
        config.base_lr * LR_SCALINGS[config.lr_scaling](config.batch_size),
        steps_per_epoch=steps_per_epoch,
        total_epochs=config.total_epochs,
        shape=config.lr_schedule,
        per=config.lr_per,
        warmup_epochs=config.warmup_epochs,
        milestones=config.lr_milestones,
    )


def check_schedule(config):
    """Raises `UserError` unless `config` describes a valid schedule."""
    end, warm = config.total_epochs, config.warmup_epochs
    if warm >= end:
        raise UserError(
            f"Expected --warmup_epochs below --total_epochs={end}, received "
            f"{warm:g}; shorten the warm-up or train longer."
        )
    milestones = config.lr_milestones
    if bool(milestones) != (config.lr_schedule == "steps"):
        raise UserError(
            "Expected --lr_milestones if and only if --lr_schedule=steps, "
            f"received {','.join(map(str, milestones)) or 'none'} with "
            f"--lr_schedule={config.lr_schedule}; change one of the two flags."
        )
    inner = (warm, *milestones, end)
    if any(one >= two for one, two in zip(inner, inner[1:])):
        raise UserError(
            f"Expected increasing --lr_milestones above --warmup_epochs="
            f"{warm:g} and below --total_epochs={end}, received "
            f"{','.join(map(str, milestones))}; change the milestones."
        )
