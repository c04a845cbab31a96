"""Convert TensorProtos to arrays and back.

`tf.make_ndarray` trusts its message, and a few bytes can request any amount of
memory. Therefore sizes are checked first.

Source: tensorflow/core/framework/tensor.cc, Tensor::FromProto.
"""

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

from export.serving.serving_error import invalid

# Fields of values that are not in `tensor_content`; `int_val` for _SMALL.
_FIELDS = {
    "float32": "float_val",
    "float64": "double_val",
    "float16": "half_val",
    "bfloat16": "half_val",
    "int64": "int64_val",
    "uint32": "uint32_val",
    "uint64": "uint64_val",
    "bool": "bool_val",
    "string": "string_val",
}
_SMALL = ("int8", "int16", "int32", "uint8", "uint16")
_MAX_RANK = 32  # NumPy's limit


def to_array(proto, name, *, max_bytes):
    """Converts a `TensorProto` from a client.

    Args:
        proto: the message. The last value stands for missing ones; surplus
            values are ignored.
        name: name of the input, for error messages.
        max_bytes: maximum size of the array, unless the message is larger.

    Returns:
        array; strings are `bytes` objects.

    Raises:
        ServingError: INVALID_ARGUMENT, the message is inconsistent or its type
            is not supported.
    """
    try:
        dtype = tf.as_dtype(proto.dtype)
    except TypeError:
        dtype = tf.variant
    field = _FIELDS.get(dtype.name, "int_val")
    if field == "int_val" and dtype.name not in _SMALL:
        raise _error(name, f"type {proto.dtype} is not supported")
    shape = [dimension.size for dimension in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or min(shape, default=0) < 0:
        raise _error(name, f"shape {shape[:_MAX_RANK]} is not fully defined")
    size = dtype.size if field != "string_val" else 8  # pointers
    # Counts 0 as 1: NumPy limits the other dimensions of an empty array, too.
    limit = max(max_bytes, proto.ByteSize()) // size
    if len(shape) > _MAX_RANK or math.prod(max(n, 1) for n in shape) > limit:
        raise _error(name, f"shape {shape[:_MAX_RANK]} is too large")
    count = math.prod(shape)
    if proto.tensor_content and (
        field == "string_val" or len(proto.tensor_content) != count * size
    ):
        raise _error(
            name, "the size of tensor_content does not match the shape"
        )
    values = getattr(proto, field)
    del values[count:]
    if field in ("int_val", "half_val") and values:  # both are int32
        small = dtype.as_numpy_dtype if field == "int_val" else np.uint16
        limits = np.iinfo(small)
        if min(values) < limits.min or max(values) > limits.max:
            raise _error(name, f"a value is out of range for {dtype.name}")
    return tf.make_ndarray(proto)


def from_array(array):
    """Returns a `TensorProto` with the fields that TensorFlow Serving uses."""
    dtype = tf.as_dtype(array.dtype)
    proto = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum)
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    field = _FIELDS.get(dtype.name, "int_val")
    if field == "half_val":
        array = np.ascontiguousarray(array).view(np.uint16)
    getattr(proto, field).extend(array.ravel().tolist())
    return proto


def _error(name, reason):
    return invalid(f"Tensor of input {name[:100]!r}: {reason}.")
