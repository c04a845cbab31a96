"""LAMB and AdamW for environments without tensorflow-addons.

They are bit-identical to tensorflow-addons 0.23 and use the same names for
slots and hyperparameters, so each can read the other's checkpoints
(`tests/test_optimizer.py`). Both use the first and second moments of Keras'
Adam, their base class.

Sources: arXiv 1904.00962 (LAMB), 1711.05101 (AdamW).
"""

import tensorflow as tf
from tensorflow import keras


class _AdamWithDecay(keras.optimizers.legacy.Adam):
    """Adam with a weight decay hyperparameter, which subclasses apply.

    Args:
        learning_rate: float or schedule.
        weight_decay: see the subclasses.
        epsilon: added to the square root of the second moment.
        name: name of the optimizer.
    """

    def __init__(self, learning_rate, weight_decay, epsilon, name):
        super().__init__(learning_rate, epsilon=epsilon, name=name)
        self._set_hyper("weight_decay", weight_decay)

    def _prepare_local(self, var_device, var_dtype, apply_state):
        super()._prepare_local(var_device, var_dtype, apply_state)
        apply_state[(var_device, var_dtype)]["weight_decay"] = tf.identity(
            self._decay_of_step(var_dtype)
        )

    def _decay_of_step(self, dtype):
        """The weight decay of this step, a scalar."""
        return self._get_hyper("weight_decay", dtype)

    def _do_use_weight_decay(self, variable):
        """Whether a variable decays."""
        del variable
        return True

    def _coefficients(self, variable, apply_state):
        """The coefficients of `_prepare_local` for a variable's device."""
        place = variable.device, variable.dtype.base_dtype
        return (apply_state or {}).get(place) or self._fallback_apply_state(
            *place
        )

    def _resource_apply_sparse(self, grad, var, indices, apply_state=None):
        # Adam's implementation would omit the decay.
        raise NotImplementedError("sparse gradients")


class AdamW(_AdamWithDecay):
    """Adam with decoupled weight decay.

    Each step first subtracts `weight_decay * w` from the weights `w`.

    Args:
        learning_rate: float or schedule.
        weight_decay: share of the weights that a step subtracts.
        name: name of the optimizer.
    """

    def __init__(self, learning_rate, weight_decay, name="AdamW"):
        """See the class."""
        super().__init__(learning_rate, weight_decay, 1e-7, name)

    def _decay_of_step(self, dtype):
        return self._decayed_wd(dtype)

    def _decayed_wd(self, dtype):
        """Share of one step, a scalar. Subclasses may scale it by the rate."""
        return self._get_hyper("weight_decay", dtype)

    def _resource_apply_dense(self, grad, var, apply_state=None):
        decayed = []
        if self._do_use_weight_decay(var):
            share = self._coefficients(var, apply_state)["weight_decay"]
            decayed = [var.assign_sub(share * var, self._use_locking)]
        with tf.control_dependencies(decayed):
            return super()._resource_apply_dense(grad, var, apply_state)


class LAMB(_AdamWithDecay):
    """Adam whose rate adapts to the norms of each variable.

        u <- m' / (sqrt(v') + epsilon) + decay * w;   w <- w - lr * trust * u
        trust = |w| / |u|, or 1 where either norm is 0

    with m' and v' the bias-corrected moments.

    Args:
        learning_rate: float or schedule.
        weight_decay: coefficient of the weights in the update.
        name: name of the optimizer.
    """

    def __init__(self, learning_rate, weight_decay, name="LAMB"):
        """See the class."""
        super().__init__(learning_rate, weight_decay, 1e-6, name)

    def _resource_apply_dense(self, grad, var, apply_state=None):
        c = self._coefficients(var, apply_state)
        # The last bit depends on the order of these operations.
        m = self._average(var, "m", grad, c, "beta_1")
        v = self._average(var, "v", grad * grad, c, "beta_2")
        update = m / (tf.sqrt(v) + c["epsilon"])
        if self._do_use_weight_decay(var):
            update += c["weight_decay"] * var
        weight_norm, update_norm = tf.norm(var), tf.norm(update)
        trust = tf.where(
            (weight_norm > 0) & (update_norm > 0),
            weight_norm / update_norm,
            1.0,
        )
        return var.assign(
            var - trust * c["lr_t"] * update, use_locking=self._use_locking
        )

    def _average(self, var, slot, value, c, beta):
        """Updates a moving average; returns it bias-corrected."""
        average = self.get_slot(var, slot)
        moved = average.assign(
            average * c[f"{beta}_t"] + value * c[f"one_minus_{beta}_t"],
            use_locking=self._use_locking,
        )
        return moved / (1.0 - c[f"{beta}_power"])
