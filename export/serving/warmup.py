"""Runs a new version before clients do."""

import concurrent.futures
import struct

import grpc
import tensorflow as tf

from export.model import warmup
from export.serving.errors import ServingError, reason
from export.serving.execution import resize_rows
from export.serving.servable import DEFAULT_SIGNATURE
from export.serving.tensor_proto import to_array

_MAX_TENSOR_BYTES = 2**30


def warm_up(servable, path, sizes=(), *, each_size=None):
    """Runs the requests that come with a SavedModel, if there are any.

    On a GPU a program is chosen for each number of rows that comes first. On a
    CPU all is done by the first request of a signature: the others are
    checked, but not run, so that the version is there sooner.

    Args:
        servable: `Servable`, made of it.
        path: its directory.
        sizes: numbers of rows to run `serving_default` with, besides.
        each_size: whether to run each; None: if there is a GPU.

    Raises:
        ServingError: a request is not one, or fails.

    Source: tensorflow_serving/servables/tensorflow/saved_model_warmup_util.cc
    """
    if each_size is None:
        each_size = bool(tf.config.list_physical_devices("GPU"))
    path = tf.io.gfile.join(path, warmup.PATH)
    if not tf.io.gfile.exists(path):
        return
    try:
        _check_records(path)
        runs = {}  # of each signature, which are warmed up side by side
        for request in warmup.read(path):
            call, name = _prepare(servable, request)
            if name not in runs:
                rows = sizes if each_size and name == DEFAULT_SIGNATURE else ()
                runs[name] = _in_sizes(call, rows)
            elif each_size:
                runs[name].append((call, call.inputs))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for _ in pool.map(_run_all, runs.values()):
                pass  # but raise what was raised
    except ServingError as e:
        raise ServingError(e.code, f"warm-up by {path}: {e.message}") from e
    except tf.errors.OpError as e:
        raise _unreadable(path, e.message) from e
    except ValueError as e:
        raise _unreadable(path, str(e)) from e


def _prepare(servable, request):
    """The checked request, and the name of its signature."""
    inputs = {
        name: to_array(proto, name, max_bytes=_MAX_TENSOR_BYTES)
        for name, proto in request.inputs.items()
    }
    name = request.model_spec.signature_name or DEFAULT_SIGNATURE
    return servable.prepare(name, inputs, request.output_filter), name


def _in_sizes(call, sizes):
    """Pairs of the call and inputs: its own, and so many rows of them."""
    others = [resize_rows(call.inputs, n) for n in sizes if call.key]
    return [(call, inputs) for inputs in [call.inputs, *others]]


def _run_all(pairs):
    for call, inputs in pairs:
        call.run(inputs)


def _check_records(path):
    """Raises `ValueError` where a record is said to end after the file.

    TensorFlow's reader takes as much memory as it is told to.

    Source: tensorflow/core/lib/io/record_writer.h: 8 bytes of length, 4 of
    its checksum, the data, 4 of its checksum.
    """
    left = tf.io.gfile.stat(path).length
    with tf.io.gfile.GFile(path, "rb") as file:
        while left:
            header = file.read(12)
            if len(header) < 12:
                raise ValueError("the end is missing")
            (length,) = struct.unpack("<Q", header[:8])
            if length + 16 > left:
                raise ValueError("not a TFRecord, or the end is missing")
            left -= length + 16
            file.seek(file.tell() + length + 4)


def _unreadable(path, why):
    return ServingError(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"warm-up by {path}: {reason(why)}. Please verify your warmup data is "
        "in TFRecord format.",
    )
