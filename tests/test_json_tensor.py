"""JSON to and from arrays."""

import json

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies
from tensorflow.core.protobuf import meta_graph_pb2

from export.serving import json_tensor
from export.serving.serving_error import ServingError


def signatures():
    def signature(**inputs):
        return meta_graph_pb2.SignatureDef(
            inputs={
                name: meta_graph_pb2.TensorInfo(dtype=dtype.as_datatype_enum)
                for name, dtype in inputs.items()
            }
        )

    return {
        "serving_default": signature(x=tf.string),
        "f": signature(x=tf.float32),
        "u": signature(x=tf.uint8),
        "two": signature(x=tf.float32, y=tf.bool),
        "none": signature(),
        "complex": signature(x=tf.complex64),
    }


def read(body):
    return json_tensor.read_request(json_tensor.load(body), signatures())


LEAVES = (
    strategies.none()
    | strategies.booleans()
    | strategies.floats()
    | strategies.integers(-(2**70), 2**70)
    | strategies.text(max_size=4)
    | strategies.just({"b64": "YQ=="})
)
VALUES = strategies.recursive(
    LEAVES,
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(
            strategies.sampled_from(["x", "y", "b64", "z"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@hypothesis.settings(deadline=None, max_examples=500, derandomize=True)
@hypothesis.given(
    document=strategies.fixed_dictionaries(
        {},
        optional={
            "signature_name": strategies.sampled_from([*signatures(), 5, ""]),
            "instances": VALUES,
            "inputs": VALUES,
        },
    )
)
def test_no_document_is_too_odd(document):
    try:
        _, inputs, rows = read(json.dumps(document).encode())
    except ServingError as e:
        assert e.code.name == "INVALID_ARGUMENT"
        json.dumps(e.message)
    else:
        assert rows == ("instances" in document)
        for array in inputs.values():
            assert isinstance(array, np.ndarray)


@hypothesis.settings(deadline=None, max_examples=300, derandomize=True)
@hypothesis.given(
    body=strategies.binary(max_size=50) | strategies.text().map(str.encode)
)
def test_no_bytes_are_too_odd(body):
    with pytest.raises(ServingError, match="JSON"):
        read(body)


@pytest.mark.parametrize(
    "body, value",
    [
        (b'\xef\xbb\xbf{"inputs": ["a"]}', [b"a"]),
        (b'{"inputs": ["a"]}\0 whatever', [b"a"]),
        (b'{"inputs": ["a"], "inputs": ["b"]}', [b"a"]),
        (b'{"inputs": ["\xff"]}', [b"\xff"]),
        (
            b'{"inputs": [{"b64": "YW\\nJj\\n"}, {"b64": " YQ"}]}',
            [b"abc", b"a"],
        ),
        (b'{"inputs": {"x": ["a"], "z": 1}}', [b"a"]),
        (b'{"inputs": {"b64": "YQ=="}}', b"a"),
    ],
)
def test_bodies_that_tensorflow_serving_accepts_are_read(body, value):
    assert read(body)[1]["x"].tolist() == value


def test_a_list_of_too_many_lists_is_rejected():
    body = b'{"signature_name": "f", "inputs": [' + b"[]," * 2**21 + b"[]]}"
    with pytest.raises(ServingError, match=str(2**21)):
        read(body)


def test_float32_values_survive_in_few_digits():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 10_000, np.uint32)
    values = bits.view(np.float32)[np.newaxis]
    text = json_tensor.write_response({"x": values}, rows=False)
    assert len(text) < 16 * values.size
    found = np.float32(json.loads(text)["outputs"])
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("rows_first", [True, False])
def test_empty_and_scalar_outputs_are_written(rows_first):
    empty = {"a": np.zeros([2, 0], np.float32), "b": np.zeros([2], np.int64)}
    found = json.loads(json_tensor.write_response(empty, rows=rows_first))
    if rows_first:
        assert found == {"predictions": [{"a": [], "b": 0}] * 2}
        with pytest.raises(ServingError, match="batch sizes"):
            json_tensor.write_response({"a": np.float32(1)}, rows=True)
        uneven = dict(empty, b=np.zeros([3]))
        with pytest.raises(ServingError, match="inconsistent"):
            json_tensor.write_response(uneven, rows=True)
    else:
        assert found == {"outputs": {"a": [[], []], "b": [0, 0]}}
        scalar = json_tensor.write_response({"a": np.float32(1)}, rows=False)
        assert json.loads(scalar) == {"outputs": 1.0}
