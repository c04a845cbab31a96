"""Optimizers and learning-rate schedules."""

import math
import warnings

import tensorflow as tf
from tensorflow import keras

OPTIMIZERS = ("sgd", "lamb")


class SGD(keras.optimizers.SGD):
    """Momentum SGD with coupled L2, step for step as PyTorch defines it.

        g <- g + l2 * w;   v <- momentum * v + g;   w <- w - lr * v

    Keras differs twice: its `weight_decay=` is decoupled (it bypasses the
    momentum: 50 steps without gradient at lr 0.1, decay 0.01, momentum 0.9
    leave 0.951 of a weight instead of 0.644), and it folds the learning rate
    into the momentum buffer, which lags whenever the rate changes.

    Args:
        learning_rate: float or schedule.
        momentum: in [0, 1).
        l2: coefficient of the weight itself in the gradient, applied to every
            variable, normalisation and biases included (as MoCo and CLSA do).

    Source: torch.optim.SGD; compared in `tests/test_optimizer.py`.
    """

    def __init__(self, learning_rate, *, momentum=0.9, l2=0.0, name="SGD"):
        """See the class."""
        super().__init__(learning_rate, momentum=momentum, name=name)
        self.l2 = l2

    def update_step(self, gradient, variable):
        """Applies one step to one variable (called by Keras, after summing)."""
        lr = tf.cast(self.learning_rate, variable.dtype)
        velocity = self.momentums[self._index_dict[self._var_key(variable)]]
        gradient = tf.convert_to_tensor(gradient) + self.l2 * variable
        velocity.assign(self.momentum * velocity + gradient)
        variable.assign_sub(lr * velocity)

    def get_config(self):
        """Returns the arguments that make this optimizer again."""
        config = super().get_config()
        return {k: config[k] for k in ("learning_rate", "momentum", "name")} | {
            "l2": self.l2
        }


class CosineByEpoch(keras.optimizers.schedules.LearningRateSchedule):
    """Half a cosine down to zero, constant within each epoch.

        lr(epoch e of E) = peak * (1 + cos(pi e / E)) / 2

    Args:
        peak: learning rate of the first epoch.
        steps_per_epoch: steps per epoch.
        total_epochs: E.

    Source: `adjust_learning_rate` of maple-research-lab/CLSA@37df76c.
    """

    def __init__(self, peak, *, steps_per_epoch, total_epochs):
        """See the class."""
        self.peak = peak
        self.steps_per_epoch = steps_per_epoch
        self.total_epochs = total_epochs

    def __call__(self, step):
        """Learning rate, float32 scalar, at `step` (from 0)."""
        epoch = tf.cast(step, tf.int64) // self.steps_per_epoch
        share = tf.cast(epoch, tf.float32) / self.total_epochs
        return self.peak * 0.5 * (1.0 + tf.cos(math.pi * share))

    def get_config(self):
        """Returns the arguments that make this schedule again."""
        return {
            "peak": self.peak,
            "steps_per_epoch": self.steps_per_epoch,
            "total_epochs": self.total_epochs,
        }


def make_optimizer(name, learning_rate, *, momentum, l2, precision="float32"):
    """Returns the optimizer called `name`.

    Args:
        name: one of `OPTIMIZERS`; `"lamb"`, for batches of thousands, is
            tensorflow-addons' (arXiv 1904.00962).
        learning_rate: float or schedule.
        momentum: of SGD, in [0, 1); LAMB keeps its betas of 0.9 and 0.999.
        l2: coefficient of L2 in SGD's gradient, of weight decay in LAMB.
        precision: Keras policy of the network. With `"mixed_float16"` the loss
            is scaled, by a factor that adapts, so that small gradients do not
            vanish; steps whose gradients are not finite are left out.
    """
    inner = _make_optimizer(name, learning_rate, momentum, l2)
    if precision == "mixed_float16":
        return keras.mixed_precision.LossScaleOptimizer(inner)
    return inner


def _make_optimizer(name, learning_rate, momentum, l2):
    if name == "sgd":
        return SGD(learning_rate, momentum=momentum, l2=l2)
    with warnings.catch_warnings():
        # It announces its end of life; BUILD.md says why it is here.
        warnings.simplefilter("ignore", UserWarning)
        import tensorflow_addons as tfa  # slow to import, rarely needed

    return tfa.optimizers.LAMB(learning_rate, weight_decay=l2)


def build(optimizer, variables):
    """Creates the optimizer's variables, so that a checkpoint fills them."""
    # Within one that scales the loss, if it does.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if hasattr(optimizer, "build"):
        optimizer.build(variables)
    else:  # tensorflow-addons still builds on Keras' legacy optimizers
        optimizer._create_all_weights(variables)
