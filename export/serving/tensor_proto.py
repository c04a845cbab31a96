"""TensorProtos to and from arrays.

`tf.make_ndarray` trusts its message: a few bytes can ask for any amount of
memory. So sizes are checked first.

Source: tensorflow/core/framework/tensor.cc, Tensor::FromProto.
"""

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

from export.serving.errors import invalid

# Where values are unless in `tensor_content`; smaller integers: `int_val`.
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
_MAX_RANK = 32  # NumPy's


def to_array(proto, name, *, max_bytes):
    """Reads a `TensorProto` that a client sent.

    Args:
        proto: the message; too few values are repeated, too many are left out.
        name: of the input, for messages.
        max_bytes: of the largest array that is made of a smaller message.

    Returns:
        array; strings are `bytes` as objects.

    Raises:
        ServingError: INVALID_ARGUMENT, the message contradicts itself or its
            type cannot be sent.
    """
    try:
        dtype = tf.as_dtype(proto.dtype)
    except TypeError:
        dtype = tf.variant
    field = _FIELDS.get(dtype.name, "int_val")
    if field == "int_val" and dtype.name not in _SMALL:
        raise _wrong(name, f"type {proto.dtype} cannot be sent")
    shape = [dimension.size for dimension in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or min(shape, default=0) < 0:
        raise _wrong(name, f"shape {shape[:_MAX_RANK]} is not known in full")
    size = dtype.size if field != "string_val" else 8  # pointers
    # As if no dimension was 0: no array can be indexed beyond that.
    most = max(max_bytes, proto.ByteSize()) // size
    if len(shape) > _MAX_RANK or math.prod(max(n, 1) for n in shape) > most:
        raise _wrong(name, f"shape {shape[:_MAX_RANK]} is too large")
    count = math.prod(shape)
    if proto.tensor_content and (
        field == "string_val" or len(proto.tensor_content) != count * size
    ):
        raise _wrong(name, "tensor_content has another size than its shape")
    values = getattr(proto, field)
    del values[count:]
    if field in ("int_val", "half_val") and values:  # both are int32
        small = dtype.as_numpy_dtype if field == "int_val" else np.uint16
        limits = np.iinfo(small)
        if min(values) < limits.min or max(values) > limits.max:
            raise _wrong(name, f"a value is no {dtype.name}")
    return tf.make_ndarray(proto)


def from_array(array):
    """Writes a `TensorProto` as TensorFlow Serving does, value by value."""
    dtype = tf.as_dtype(array.dtype)
    proto = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum)
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    field = _FIELDS.get(dtype.name, "int_val")
    if field == "half_val":
        array = np.ascontiguousarray(array).view(np.uint16)
    getattr(proto, field).extend(array.ravel().tolist())
    return proto


def _wrong(name, reason):
    return invalid(f"Tensor of input {name[:100]!r}: {reason}.")
