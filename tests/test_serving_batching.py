"""Requests of several clients in one batch, and the file of parameters."""

import concurrent.futures
import threading

import grpc
import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.errors import UserError
from export.serving.config_files import read_batching_parameters
from export.serving.servable import Servable
from export.serving.serving_error import ServingError

_CODE = grpc.StatusCode
WAITING = {"batch_timeout_micros": 200_000, "num_batch_threads": 1}


class Module(tf.Module):
    """Returns with each row the size of its batch; rejects rows below 0."""

    def __init__(self, factor):
        super().__init__()
        self.factor = tf.Variable(float(factor))

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32)])
    def __call__(self, x):
        good = tf.debugging.Assert(tf.reduce_all(x >= 0), ["a row below 0"])
        with tf.control_dependencies([good]):
            rows = tf.fill([tf.shape(x)[0]], tf.shape(x)[0])
        return {"y": x * self.factor, "rows": rows}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Directories of models that multiply by 1 and by 2."""
    base = tmp_path_factory.mktemp("models")
    for factor in (1, 2):
        module = Module(factor)
        tf.saved_model.save(
            module, str(base / str(factor)), signatures=module.__call__
        )
    return base


def load(path, **parameters):
    batching = read_batching_parameters() | WAITING | parameters
    return Servable(str(path), batching=batching)


def run(servable, x):
    return servable.run("serving_default", {"x": np.float32(x)})


def together(*calls):
    """Runs calls concurrently; returns their results or `ServingError`s."""
    ready = threading.Barrier(len(calls))

    def call(servable, x):
        ready.wait()
        try:
            return run(servable, x)
        except ServingError as e:
            return e

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda one: call(*one), calls))


def test_requests_are_batched_and_split_again(base):
    servable = load(base / "1")
    sent = [np.full([1 + i % 3, 2], i, np.float32) for i in range(12)]
    found = together(*((servable, x) for x in sent))
    for x, answer in zip(sent, found):
        np.testing.assert_array_equal(answer["y"], x)
    assert max(answer["rows"].max() for answer in found) > 3


def test_batches_are_padded_to_allowed_sizes(base):
    servable = load(base / "1", max_batch_size=6, allowed_batch_sizes=[4, 6])
    assert run(servable, [[1], [2]])["rows"].tolist() == [4, 4]
    assert run(servable, [[1]] * 5)["y"].tolist() == [[1]] * 5


def test_one_failure_fails_the_whole_batch(base):
    """As in TensorFlow Serving."""
    servable = load(base / "1", max_batch_size=3)
    found = together((servable, [[1]]), (servable, [[-1]]), (servable, [[2]]))
    assert {error.code for error in found} == {_CODE.INVALID_ARGUMENT}
    assert {error.message for error in found} == {"a row below 0"}
    assert run(servable, [[1]])["y"] == 1


def test_rows_of_unequal_shapes_fail_together(base):
    servable = load(base / "1", max_batch_size=2)
    found = together((servable, [[1]]), (servable, [[1, 2]]))
    assert {one.code for one in found} == {_CODE.INVALID_ARGUMENT}


def test_requests_larger_than_a_batch_are_rejected(base):
    servable = load(base / "1", max_batch_size=4)
    with pytest.raises(ServingError, match="Task size 5 is larger") as caught:
        run(servable, [[1]] * 5)
    assert caught.value.code == _CODE.INVALID_ARGUMENT


def test_a_full_queue_rejects_requests(base):
    servable = load(base / "1", max_batch_size=1, max_enqueued_batches=1)
    found = together(*((servable, [[1]]) for _ in range(64)))
    codes = {getattr(one, "code", None) for one in found}
    assert codes == {None, _CODE.UNAVAILABLE}


def test_versions_have_separate_batches(base):
    one, two = load(base / "1"), load(base / "2")
    calls = [(one, [[3]]), (two, [[3]])] * 8
    found = [answer["y"].item() for answer in together(*calls)]
    assert found == [3, 6] * 8
    one.close()
    assert run(two, [[1]])["y"] == 2


def test_batching_parameters_are_read(tmp_path):
    path = tmp_path / "batching.txt"
    path.write_text("")
    found = read_batching_parameters(path)
    assert found == read_batching_parameters()
    assert found["max_batch_size"] == 1000
    assert found["max_enqueued_batches"] == 10
    path.write_text(
        """
        max_batch_size { value: 8 }
        batch_timeout_micros { value: 1000 }
        max_enqueued_batches { value: 16 }
        num_batch_threads { value: 3 }
        thread_pool_name { value: "pool" }
        allowed_batch_sizes: 2
        allowed_batch_sizes: 8
        """
    )
    assert read_batching_parameters(path) == {
        "max_batch_size": 8,
        "batch_timeout_micros": 1000,
        "max_enqueued_batches": 16,
        "num_batch_threads": 3,
        "allowed_batch_sizes": [2, 8],
    }


@pytest.mark.parametrize(
    "text, values",
    [
        ("max_batch_size { value: 0 }", "max_batch_size from 1 .* 0;"),
        ("num_batch_threads { value: -1 }", "num_batch_threads from 1 .* -1;"),
        ("max_enqueued_batches { value: 0 }", "max_enqueued_batches from 1 "),
        ("batch_timeout_micros { value: -1 }", "batch_timeout_micros from 0 "),
        ("allowed_batch_sizes: [8, 4, 1000]", r"\[8, 4, 1000\]"),
        ("allowed_batch_sizes: [4, 4, 1000]", r"\[4, 4, 1000\]"),
        ("allowed_batch_sizes: [0, 1000]", r"\[0, 1000\]"),
        ("allowed_batch_sizes: [4, 16]", r"max_batch_size, 1000.*\[4, 16\]"),
        ("pad_variable_length_inputs: true", "pad_variable_length_inputs"),
        ("enable_large_batch_splitting { value: true }", "batch_splitting"),
        ("max_batch_size: 8", "BatchingParameters"),
        ("max_batch { value: 8 }", "BatchingParameters"),
        ("\x00", "BatchingParameters"),
    ],
)
def test_wrong_batching_parameters_are_rejected(text, values, tmp_path):
    path = tmp_path / "batching_parameters.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=values) as caught:
        read_batching_parameters(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_rejected():
    with pytest.raises(UserError, match="no-such-file"):
        read_batching_parameters("/no-such-file")
