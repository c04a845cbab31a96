"""Runs a new version before clients do."""

import struct

import grpc
import tensorflow as tf

from export import warmup
from export.serving.errors import ServingError, reason
from export.serving.execution import resize_rows
from export.serving.servable import DEFAULT_SIGNATURE
from export.serving.tensor_proto import to_array

_MAX_TENSOR_BYTES = 2**30


def warm_up(servable, path, sizes=()):
    """Runs the requests that come with a SavedModel, if there are any.

    Args:
        servable: `Servable`, made of it.
        path: its directory.
        sizes: numbers of rows to run `serving_default` with, besides.

    Raises:
        ServingError: a request is not one, or fails.

    Source: tensorflow_serving/servables/tensorflow/saved_model_warmup_util.cc
    """
    path = tf.io.gfile.join(path, warmup.PATH)
    if not tf.io.gfile.exists(path):
        return
    try:
        _check_records(path)
        for request in warmup.read(path):
            call = _run(servable, request)
            if request.model_spec.signature_name in ("", DEFAULT_SIGNATURE):
                for size in sizes if call.key else ():
                    call.run(resize_rows(call.inputs, size))
                sizes = ()
    except ServingError as e:
        raise ServingError(e.code, f"warm-up by {path}: {e.message}") from e
    except tf.errors.OpError as e:
        raise _unreadable(path, e.message) from e
    except ValueError as e:
        raise _unreadable(path, str(e)) from e


def _run(servable, request):
    inputs = {
        name: to_array(proto, name, max_bytes=_MAX_TENSOR_BYTES)
        for name, proto in request.inputs.items()
    }
    call = servable.prepare(
        request.model_spec.signature_name, inputs, request.output_filter
    )
    call.run(call.inputs)
    return call


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
