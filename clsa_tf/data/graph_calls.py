"""Ways to call a function in a graph: as one node, in Python, or guarded."""

import atexit
import gc
import sys

import tensorflow as tf


def opaque(function):
    """Makes a function of tensors a single node of the graphs that call it.

    In a mapped function, TensorFlow looks up all nodes by name in each call, so
    fewer nodes are faster. A function that is called several times is also
    optimized only once.
    """
    return tf.function(
        function, experimental_attributes={"_noinline": True}, autograph=False
    )


def in_python(function, inputs, dtypes, *, stateful):
    """Calls a Python function of NumPy arrays inside a graph.

    This is `tf.numpy_function`. In addition, `_end_pipelines` lets the process
    end while calls are in progress.
    """
    return tf.numpy_function(function, inputs, dtypes, stateful=stateful)


@atexit.register
def _end_pipelines():
    """Ends unused pipelines while Python can still serve their calls.

    After this point, a thread that calls Python ends in the middle of the call.
    Anything that waits for it, such as the end of its pipeline, waits forever.
    After an error, a cycle of frames or the last printed traceback can keep a
    pipeline alive.
    """
    sys.last_exc = sys.last_value = sys.last_traceback = None
    gc.collect()


def attempt(function, arguments, *, otherwise):
    """Calls a function of tensors that may fail, inside a graph.

    It costs about 0.1 ms per call. It uses a dataset that drops errors, because
    nothing else in TensorFlow lets a graph continue after an error.

    Args:
        function: function from `arguments` to a structure of tensors.
        arguments: a tensor, or a tuple of tensors.
        otherwise: the result if `function` fails, of the same structure and
            dtypes.

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
