"""Functions that a graph calls: as one node, in Python, or guarded."""

import atexit
import gc
import sys

import tensorflow as tf


def opaque(function):
    """Makes a function of tensors one node of the graphs that call it.

    In a mapped function all nodes are looked at again, by name, in each call;
    and what is called several times is optimized once.
    """
    return tf.function(
        function, experimental_attributes={"_noinline": True}, autograph=False
    )


def in_python(function, inputs, dtypes, *, stateful):
    """Calls a Python function of NumPy arrays inside a graph.

    As `tf.numpy_function`, but a process can end while such calls are under
    way (`_end_pipelines`).
    """
    return tf.numpy_function(function, inputs, dtypes, stateful=stateful)


@atexit.register
def _end_pipelines():
    """Ends pipelines that nobody holds, as long as Python answers them.

    Afterwards a thread that calls Python is ended in the middle, and whoever
    waits for it, such as the pipeline's own end, waits for ever. What holds one
    after an error is a cycle of frames, or the traceback that was printed last.
    """
    sys.last_exc = sys.last_value = sys.last_traceback = None
    gc.collect()


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
