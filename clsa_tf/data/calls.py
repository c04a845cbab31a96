"""Functions that a graph calls: as one node, or guarded against errors."""

import tensorflow as tf


def opaque(function):
    """Makes a function of tensors one node of the graphs that call it.

    In a mapped function all nodes are looked at again, by name, in each call;
    and what is called several times is optimized once.
    """
    return tf.function(
        function, experimental_attributes={"_noinline": True}, autograph=False
    )


def attempt(function, arguments, *, otherwise):
    """Calls a function of tensors that may fail, inside a graph.

    It costs about 0.1 ms per call. (A dataset that drops errors is the only
    place where TensorFlow lets a graph survive one.)

    Args:
        function: from `arguments` to a structure of tensors.
        arguments: a tensor, or a tuple of tensors.
        otherwise: the result if `function` fails; same structure and dtypes.

    Returns:
        (worked bool[], result).
    """
    called = opaque(function)
    good = tf.data.Dataset.from_tensors(arguments).map(
        lambda *tensors: (True, called(*tensors))
    )
    bad = tf.data.Dataset.from_tensors((False, otherwise))
    both = good.ignore_errors().concatenate(bad)
    return both.take(1).get_single_element()
