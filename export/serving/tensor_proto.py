"""TensorProtos to and from arrays, whatever a client puts into them.

`tf.make_ndarray` trusts its proto: a few bytes of it can ask for any amount
of memory.

Source: tensorflow/core/framework/tensor.proto and tensor.cc,
Tensor::FromProto.
"""

import math

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2

from export.serving.errors import ServingError

# Where values of a type are unless they are in `tensor_content`.
_FIELDS = {
    types_pb2.DT_FLOAT: "float_val",
    types_pb2.DT_DOUBLE: "double_val",
    types_pb2.DT_HALF: "half_val",
    types_pb2.DT_BFLOAT16: "half_val",
    types_pb2.DT_INT8: "int_val",
    types_pb2.DT_INT16: "int_val",
    types_pb2.DT_INT32: "int_val",
    types_pb2.DT_INT64: "int64_val",
    types_pb2.DT_UINT8: "int_val",
    types_pb2.DT_UINT16: "int_val",
    types_pb2.DT_UINT32: "uint32_val",
    types_pb2.DT_UINT64: "uint64_val",
    types_pb2.DT_BOOL: "bool_val",
    types_pb2.DT_STRING: "string_val",
}
_MAX_RANK = 32  # NumPy's
# Values converted at a time; other threads get their turn in between.
_PART = 2**16


def to_array(proto, name, *, max_bytes):
    """Reads a `TensorProto`.

    Args:
        proto: the message; not trusted.
        name: of the input, for messages.
        max_bytes: largest array that is made of a smaller message, in bytes.

    Returns:
        array, read-only where it is the message's own memory; strings are
        `bytes` as objects.

    Raises:
        ServingError: INVALID_ARGUMENT if the message contradicts itself or is
            of a type that cannot be sent.
    """
    field = _FIELDS.get(proto.dtype)
    if field is None:
        raise _invalid(name, f"type {proto.dtype} cannot be sent")
    dtype = tf.as_dtype(proto.dtype).as_numpy_dtype
    shape = _shape(proto.tensor_shape, name)
    itemsize = np.dtype(dtype).itemsize
    # As if no dimension was 0: what cannot be held cannot be indexed.
    most = max(max_bytes, proto.ByteSize()) // itemsize
    if math.prod(max(size, 1) for size in shape) > most:
        raise _invalid(name, f"shape {shape} is too large")
    count = math.prod(shape)
    if proto.tensor_content:
        flat = _content(proto, dtype, count, name)
    elif field == "string_val":
        flat = _strings(proto.string_val, count, name)
    else:
        flat = _values(getattr(proto, field), field, dtype, count, name)
    return flat.reshape(shape)


def from_array(array):
    """Writes a `TensorProto` as TensorFlow Serving does, value by value.

    Args:
        array: of any type above; strings are `bytes` as objects.

    Returns:
        the message.
    """
    dtype = tf.as_dtype(array.dtype).as_datatype_enum
    proto = tensor_pb2.TensorProto(dtype=dtype)
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    field = _FIELDS[dtype]
    if field == "half_val":
        array = np.ascontiguousarray(array).view(np.uint16)
    getattr(proto, field).extend(array.ravel().tolist())
    return proto


def _invalid(name, reason):
    return ServingError(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"Tensor of input {name[:100]!r}: {reason}.",
    )


def _shape(proto, name):
    if proto.unknown_rank:
        raise _invalid(name, "its shape is unknown")
    if len(proto.dim) > _MAX_RANK:
        raise _invalid(name, f"more than {_MAX_RANK} dimensions")
    shape = [dimension.size for dimension in proto.dim]
    if min(shape, default=0) < 0:
        raise _invalid(name, f"shape {shape} has negative sizes")
    return shape


def _content(proto, dtype, count, name):
    if proto.dtype == types_pb2.DT_STRING:
        raise _invalid(name, "strings belong in string_val")
    size = len(proto.tensor_content)
    expected = count * np.dtype(dtype).itemsize
    if size != expected:
        raise _invalid(
            name, f"tensor_content has {size} bytes, its shape {expected}"
        )
    if proto.dtype == types_pb2.DT_BOOL:  # other bytes than 0 and 1
        return np.frombuffer(proto.tensor_content, np.uint8) != 0
    return np.frombuffer(proto.tensor_content, dtype)


def _strings(values, count, name):
    if len(values) != count:
        raise _invalid(name, f"{len(values)} strings for {count} elements")
    flat = np.empty(count, object)
    flat[:] = values
    return flat


def _values(values, field, dtype, count, name):
    """Numbers one by one; the last stands for all that are left out."""
    if len(values) > count:
        raise _invalid(name, f"{len(values)} values for {count} elements")
    as_sent = np.uint16 if field == "half_val" else dtype
    flat = np.zeros(count, as_sent)
    for start in range(0, len(values), _PART):
        part = values[start : start + _PART]
        if field in ("int_val", "half_val"):
            limits = np.iinfo(as_sent)
            if not limits.min <= min(part) <= max(part) <= limits.max:
                raise _invalid(name, f"a value is no {limits.dtype}")
        flat[start : start + len(part)] = part
    if values:
        flat[len(values) :] = values[-1]
    return flat if as_sent is dtype else flat.view(dtype)
