"""TensorProtos, valid and malformed, to and from arrays."""

import grpc
import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies
from tensorflow.core.framework import tensor_pb2, types_pb2

from export.serving import tensor_proto
from export.serving.serving_error import ServingError


@hypothesis.settings(deadline=None, max_examples=300, derandomize=True)
@hypothesis.given(
    dtype=strategies.integers(0, 40),
    shape=strategies.lists(strategies.integers(-2, 2**63 - 1), max_size=5),
    content=strategies.binary(max_size=20),
    ints=strategies.lists(strategies.integers(-(2**31), 2**31 - 1), max_size=3),
    strings=strategies.lists(strategies.binary(max_size=3), max_size=3),
)
def test_no_tensor_is_too_odd(dtype, shape, content, ints, strings):
    tensor = tensor_pb2.TensorProto(
        dtype=dtype,
        tensor_content=content,
        int_val=ints,
        half_val=ints,
        string_val=strings,
    )
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    try:
        array = tensor_proto.to_array(tensor, "x", max_bytes=1000)
    except ServingError as e:
        assert e.code == grpc.StatusCode.INVALID_ARGUMENT
    else:
        assert list(array.shape) == shape and array.nbytes <= 1000


@pytest.mark.parametrize(
    "array",
    [
        np.float32([[1, 2]]),
        np.float16([1.5, -2]),
        tf.constant([1.5, 3], tf.bfloat16).numpy(),
        np.array([b"a", b"b\0"], object),
        np.uint8([0, 255]),
        np.array([True, False]),
        np.int64(-5),
        np.uint64([2**64 - 1]),
        np.zeros([0, 3], np.float64),
    ],
    ids=lambda array: array.dtype.name,
)
def test_tensors_equal_those_of_tensorflow(array):
    np.testing.assert_array_equal(
        tf.make_ndarray(tensor_proto.from_array(array)), array
    )
    for message in (
        tf.make_tensor_proto(array),
        tensor_proto.from_array(array),
    ):
        found = tensor_proto.to_array(message, "x", max_bytes=100)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_the_last_value_is_repeated():
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_INT32, int_val=[1, 7])
    tensor.tensor_shape.dim.add(size=4)
    found = tensor_proto.to_array(tensor, "x", max_bytes=100)
    assert found.tolist() == tf.make_ndarray(tensor).tolist() == [1, 7, 7, 7]


def test_excess_values_are_ignored():
    """As in TensorFlow Serving."""
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_INT32, int_val=[1, 7])
    tensor.tensor_shape.dim.add(size=1)
    assert tensor_proto.to_array(tensor, "x", max_bytes=100).tolist() == [1]


@pytest.mark.parametrize("shape", [[-1], [-1, -2], [-1, 0]])
def test_sizes_below_zero_are_rejected(shape):
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT)
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    with pytest.raises(ServingError, match="'x'") as caught:
        tensor_proto.to_array(tensor, "x", max_bytes=100)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert str(shape) in caught.value.message
