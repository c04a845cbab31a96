"""Optimizers and learning-rate schedules."""

import warnings

import tensorflow as tf
from tensorflow import keras

from clsa_tf.optimizers import adam

OPTIMIZERS = ("sgd", "lars", "lamb", "adamw")
L2_ON = ("all", "kernels")


def is_kernel(variable):
    """Whether a variable has rank 2 or more: no bias, scale or offset."""
    return variable.shape.rank > 1


class SGD(keras.optimizers.SGD):
    """Momentum SGD with coupled L2, as PyTorch defines it.

        g <- g + l2 * w;   v <- momentum * v + g;   w <- w - lr * v

    Keras differs twice. Its `weight_decay=` is decoupled and bypasses the
    momentum: 50 steps without gradient at lr 0.1, decay 0.01, momentum 0.9
    leave 0.951 of a weight instead of 0.644. And it folds the learning rate
    into the momentum buffer, which lags whenever the rate changes.

    Args:
        learning_rate: float or schedule.
        momentum: in [0, 1).
        l2: coefficient of the weight itself in the gradient.
        l2_on: `"all"` variables, including normalisation and biases (as in MoCo
            and CLSA), or `"kernels"`, see `is_kernel`.

    Source: torch.optim.SGD; compared in `tests/test_optimizer.py`.
    """

    def __init__(
        self, learning_rate, *, momentum=0.9, l2=0.0, l2_on="all", name="SGD"
    ):
        """See the class."""
        super().__init__(learning_rate, momentum=momentum, name=name)
        self.l2 = l2
        self.l2_on = l2_on

    def update_step(self, gradient, variable):
        """Applies one step to one variable; Keras passes summed gradients."""
        lr = tf.cast(self.learning_rate, variable.dtype)
        velocity = self.momentums[self._index_dict[self._var_key(variable)]]
        gradient = tf.convert_to_tensor(gradient)
        if self.l2_on == "all" or is_kernel(variable):
            gradient += self.l2 * variable
        velocity.assign(self.momentum * velocity + gradient)
        variable.assign_sub(lr * velocity)

    def get_config(self):
        """Returns the constructor arguments, for Keras."""
        config = super().get_config()
        return {k: config[k] for k in ("learning_rate", "momentum", "name")} | {
            "l2": self.l2,
            "l2_on": self.l2_on,
        }


class LARS(keras.optimizers.SGD):
    """SGD with a rate per kernel from its norms (LARS), for large batches.

        g <- g + l2 * w;   v <- momentum * v + lr * trust * g;   w <- w - v
        trust = eta * |w| / |g|, or 1 where either norm is 0

    Biases, scales and offsets get neither L2 nor trust ratio. They are
    identified by their rank, because names differ between versions of Keras.

    Args:
        learning_rate: float or schedule.
        momentum: in [0, 1).
        l2: coefficient of the weight itself in the gradient.
        eta: trust coefficient.

    Source: arXiv 1708.03888; "classic momentum" as in SimCLR's
    tf2/lars_optimizer.py (google-research/simclr).
    """

    def __init__(
        self, learning_rate, *, momentum=0.9, l2=0.0, eta=1e-3, name="LARS"
    ):
        """See the class."""
        super().__init__(learning_rate, momentum=momentum, name=name)
        self.l2 = l2
        self.eta = eta

    def update_step(self, gradient, variable):
        """Applies one step to one variable; Keras passes summed gradients."""
        lr = tf.cast(self.learning_rate, variable.dtype)
        velocity = self.momentums[self._index_dict[self._var_key(variable)]]
        gradient = tf.convert_to_tensor(gradient)
        if is_kernel(variable):
            gradient += self.l2 * variable
            lr = lr * self._trust(tf.norm(variable), tf.norm(gradient))
        velocity.assign(self.momentum * velocity + lr * gradient)
        variable.assign_sub(velocity)

    def _trust(self, weight, gradient):
        ratio = self.eta * weight / gradient
        return tf.where((weight > 0) & (gradient > 0), ratio, 1.0)

    def get_config(self):
        """Returns the constructor arguments, for Keras."""
        config = super().get_config()
        return {k: config[k] for k in ("learning_rate", "momentum", "name")} | {
            "l2": self.l2,
            "eta": self.eta,
        }


def make_optimizer(
    name, learning_rate, *, momentum, l2, l2_on="all", precision="float32"
):
    """Makes the optimizer called `name`.

    Args:
        name: one of `OPTIMIZERS`. `"lamb"` (arXiv 1904.00962) and `"adamw"` are
            from tensorflow-addons if it is installed, otherwise from
            `clsa_tf.optimizers.adam`. Both take the same steps.
        learning_rate: float or schedule.
        momentum: momentum of SGD and LARS, in [0, 1). The others use betas of
            0.9 and 0.999.
        l2: coefficient of the weights in the gradient (SGD, LARS) or in the
            update before the trust ratio (LAMB). With AdamW each step subtracts
            the share l2 * lr of the weights.
        l2_on: one of `L2_ON`. LARS always uses `"kernels"`.
        precision: Keras policy of the network. With `"mixed_float16"` the loss
            is scaled by an adaptive factor, so that small gradients do not
            underflow, and steps with non-finite gradients are skipped.
    """
    if name == "sgd":
        inner = SGD(learning_rate, momentum=momentum, l2=l2, l2_on=l2_on)
    elif name == "lars":
        inner = LARS(learning_rate, momentum=momentum, l2=l2)
    else:
        inner = _decaying(name, learning_rate, l2, l2_on)
    if precision == "mixed_float16":
        return keras.mixed_precision.LossScaleOptimizer(inner)
    return inner


def _addons():
    """The module with LAMB and AdamW: tensorflow-addons', or this package's."""
    with warnings.catch_warnings():
        # It warns about its end of life. BUILD.md explains why it is used.
        warnings.simplefilter("ignore", UserWarning)
        try:
            # Imported here: it is slow to import and rarely needed.
            from tensorflow_addons import optimizers
        except ImportError:  # there is none for TensorFlow beyond 2.15
            return adam
    return optimizers


def _decaying(name, learning_rate, l2, l2_on):
    module = _addons()
    base = {"lamb": module.LAMB, "adamw": module.AdamW}[name]

    class Decaying(base):
        # The base class excludes variables by name, or by object identity,
        # which differs between replicas.
        def _do_use_weight_decay(self, variable):
            return l2_on == "all" or is_kernel(variable)

        # Called by AdamW, whose decay would ignore the learning rate.
        def _decayed_wd(self, dtype):
            return self._decayed_lr(dtype) * self._get_hyper(
                "weight_decay", dtype
            )

    return Decaying(learning_rate=learning_rate, weight_decay=l2)


def build(optimizer, variables):
    """Creates the optimizer's variables, so that a checkpoint can fill them."""
    # The inner optimizer, if the loss is scaled.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if hasattr(optimizer, "build"):
        optimizer.build(variables)
    else:  # LAMB and AdamW build on Keras' legacy optimizers
        optimizer._create_all_weights(variables)
