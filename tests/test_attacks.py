"""Hostile and malformed requests get errors and do not stop a server."""

import base64
import json
import os
import shutil
import socket

import grpc
import numpy as np
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from clsa_tf.data import headers
from export.model import untrusted
from tests import exports
from tests.server import ServerProcess, predict, request
from tests.test_untrusted import png_of_zeros

GOOD = exports.encode(exports.noise(1)[0])
BOMB = png_of_zeros(30_000, 30_000)


@pytest.fixture(scope="module")
def broken(exported, tmp_path_factory):
    """Version 2 has no variables, 3 has other tags, 4 is not a model."""
    base = tmp_path_factory.mktemp("broken")
    for version in (2, 3):
        shutil.copytree(exported.path, base / str(version))
    shutil.rmtree(base / "2" / "variables")
    graph = (base / "3" / "saved_model.pb").read_bytes()
    (base / "3" / "saved_model.pb").write_bytes(
        graph.replace(b"\x22\x05serve", b"\x22\x05other")
    )
    (base / "4").mkdir()
    (base / "4" / "saved_model.pb").write_bytes(b"\0garbage" * 99)
    return base


@pytest.fixture(scope="module")
def server(exported, broken, tmp_path_factory):
    """Serves version 1 after it failed to load version 4."""
    base = tmp_path_factory.mktemp("models")
    shutil.copytree(exported.path, base / "1")
    flags = [f"--model_base_path={base}", "--max_num_load_retries=0"]
    with ServerProcess(*flags) as server:
        publish(broken, base, "4")
        server.wait_for_error("'default': version 4 ")
        yield server


def publish(source, base, version):
    shutil.copytree(source / version, base / f".{version}")
    os.rename(base / f".{version}", base / version)


@pytest.fixture(autouse=True)
def the_server_stays_up(server):
    yield
    assert server.is_alive()
    spec, outputs = predict(server.grpc, request({"image_bytes": [GOOD]}))
    assert spec.version.value == 1
    assert np.isfinite(outputs["embedding"]).all()


def assert_rejected(server, message, code, *words):
    """Sends a message by gRPC and checks its rejection."""
    with pytest.raises(grpc.RpcError) as error:
        predict(server.grpc, message, timeout=120)
    assert error.value.code() == code, error.value.details()
    assert all(word in error.value.details() for word in words)


def posted(server, body, path="/v1/models/default:predict"):
    """Sends a body by REST; returns status and text of the answer."""
    keyword = "json" if isinstance(body, dict) else "data"
    answer = requests.post(server.rest + path, **{keyword: body}, timeout=120)
    return answer.status_code, answer.text


def b64(encoded):
    return {"b64": base64.b64encode(encoded).decode()}


FILES = {
    "not an image": (b"#!/bin/sh", headers.UNKNOWN),
    "nothing": (b"", headers.EMPTY),
    "truncated": (
        exports.encode(exports.noise(1)[0], "JPEG")[:300],
        headers.DAMAGED,
    ),
    "a bomb": (BOMB, headers.PIXELS),
    "zeros": (bytes(30_000_000), headers.BYTES),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_images_are_rejected(server, name):
    encoded, code = FILES[name]
    words = untrusted.reasons(untrusted.DEFAULT)[code]
    message = request({"image_bytes": [GOOD, encoded]})
    assert_rejected(server, message, grpc.StatusCode.INVALID_ARGUMENT, words)
    body = {"inputs": {"image_bytes": [b64(GOOD), b64(encoded)]}}
    status, text = posted(server, body)
    assert status == 400 and words in text and "image 1 " in text


def test_a_request_of_100_mib_is_rejected(server):
    message = request({"image_bytes": [bytes(100 * 2**20)]})
    with pytest.raises(grpc.RpcError) as error:
        predict(server.grpc, message)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    try:
        status, _ = posted(server, bytes(100 * 2**20))
    except requests.ConnectionError:
        return  # closed while it was still sending
    assert status == 413


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"instances": [' + b"[" * 50_000,
        b'{"inputs": "\xff\xfe"}',
        {"instances": [{"image_bytes": {"b64": "???"}}]},
        {"instances": [{"image_bytes": {"b64": "QUJ"}}]},
        {"instances": [{"image_bytes": {"b64": "QUJ=="}}]},
        {"instances": [{"image_bytes": {"b64": 7}}]},
        {"instances": [{"b64": [1]}]},
        {"instances": [{"image_bytes": 1.5}]},
        {"instances": [[[1]], [2]], "signature_name": "images"},
        {"inputs": {"images": [[[["x"]]]]}, "signature_name": "images"},
        {"inputs": {"image_bytes": []}},
        {"instances": []},
        {"instances": [b64(GOOD)], "inputs": [b64(GOOD)]},
        {"instances": [b64(GOOD)], "signature_name": 3},
        b'{"instances": [1e400], "signature_name": "images"}',
        b'{"instances": [NaN], "signature_name": "images"}',
        {},
    ],
    ids=repr,
)
def test_wrong_bodies_are_rejected(server, body):
    status, text = posted(server, body)
    assert status == 400, text
    assert '"error"' in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_rejected(server, value):
    images = np.full([2, 32, 32, 3], 0.5, np.float32)
    images[1, 3, 4, 1] = value
    assert_rejected(
        server,
        request({"images": images}, "images"),
        grpc.StatusCode.INVALID_ARGUMENT,
        "image 1 ",
        "finite",
    )


@pytest.mark.parametrize(
    "signature, value",
    [
        ("images", np.zeros([32, 32, 3], np.float32)),
        ("images", np.zeros([1, 32, 32, 4], np.float32)),
        ("images", np.zeros([1, 1, 32, 32, 3], np.float32)),
        ("images", np.float32(0.5)),
        ("images", np.zeros([1, 0, 0, 3], np.float32)),
        ("images", np.zeros([0, 32, 32, 3], np.float32)),
        ("images", np.zeros([1, 32, 32, 3], np.float64)),
        ("images_uint8", np.zeros([1, 32, 32, 3], np.float32)),
        ("serving_default", np.array([[GOOD]])),
        ("serving_default", np.zeros([2], np.float32)),
    ],
)
def test_wrong_shapes_and_types_are_rejected(server, signature, value):
    name = "image_bytes" if signature == "serving_default" else "images"
    message = request({name: value}, signature)
    assert_rejected(server, message, grpc.StatusCode.INVALID_ARGUMENT)


def test_ten_thousand_items_get_an_answer_or_an_error(server):
    """Either all items are answered, or the error has a message."""
    message = request({"image_bytes": [GOOD] * 10_000})
    try:
        _, outputs = predict(server.grpc, message, timeout=300)
    except grpc.RpcError as e:
        assert e.code() in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.UNAVAILABLE,
        )
        assert e.details()
    else:
        assert outputs["embedding"].shape[0] == 10_000
        assert np.ptp(outputs["embedding"], axis=0).max() < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "default/../../1",
        "/etc",
        "default\0",
        "x" * 100_000,
        "Default",
        "{}",
        "%s%n",
    ],
)
def test_malicious_names_are_rejected(server, name):
    message = request({"image_bytes": [GOOD]}, model=name)
    code = grpc.StatusCode.NOT_FOUND
    assert_rejected(server, message, code, "Servable not found")
    quoted = requests.utils.quote(name, safe="")
    for path in (f"/v1/models/{quoted}", f"/v1/models/{quoted}:predict"):
        for url in (path, path.replace("%2F", "/").replace("%2E", ".")):
            ask = requests.post if ":predict" in url else requests.get
            status = ask(server.rest + url, timeout=60).status_code
            assert status in (400, 404, 405, 414, 431), url


@pytest.mark.parametrize("version", ["-1", "0", "99", "1e3", "9" * 40, "1/.."])
def test_malicious_versions_are_rejected(server, version):
    url = f"{server.rest}/v1/models/default/versions/{version}:predict"
    status = requests.post(url, data=b"{}", timeout=60).status_code
    assert status in (400, 404)


def test_inconsistent_tensors_are_rejected(server):
    """Tensors whose bytes do not match their shape."""
    message = request({"images": np.zeros([1, 2, 2, 3], np.float32)}, "images")
    tensor = message.inputs["images"]
    for sizes in ([2**40, 2**20, 2, 3], [-1, 2, 2, 3], [1, 2, 2, 4]):
        for dim, size in zip(tensor.tensor_shape.dim, sizes):
            dim.size = size
        assert_rejected(server, message, grpc.StatusCode.INVALID_ARGUMENT)
    tensor.dtype = 12345
    assert_rejected(server, message, grpc.StatusCode.INVALID_ARGUMENT)


def test_broken_versions_are_reported_while_the_good_one_serves(server):
    states = requests.get(server.rest + "/v1/models/default", timeout=60).json()
    found = {
        s["version"]: (s["state"], s["status"]["error_code"] == "OK")
        for s in states["model_version_status"]
    }
    assert found == {"4": ("END", False), "1": ("AVAILABLE", True)}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2", "3"])
def test_the_older_version_serves_when_the_newer_cannot_be_loaded(
    exported, broken, tmp_path, version
):
    """The newer version has no variables or other tags."""
    models = tmp_path / "models"
    shutil.copytree(exported.path, models / "1")
    flags = ["--max_num_load_retries=0", f"--model_base_path={models}"]
    with ServerProcess(*flags) as server:
        publish(broken, models, version)
        url = f"{server.rest}/v1/models/default/versions/{version}"

        def state():
            answer = requests.get(url, timeout=60).json()
            if "error" in answer:
                return "none", ""
            status = answer["model_version_status"][0]
            return status["state"], status["status"]["error_message"]

        server.wait_for_error(f"'default': version {version} ")
        assert state()[0] == "END" and state()[1]
        spec, _ = predict(server.grpc, request({"image_bytes": [GOOD]}))
        assert spec.version.value == 1


def test_idle_connections_do_not_block_others(server):
    """Two hundred connections stay open without a complete request."""
    host, port = server.rest.split("//")[1].split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(200)]
    for one in idle[:100]:
        one.sendall(b"POST /v1/models/default:predict HTTP/1.1\r\nHost: a\r\n")
    status, _ = posted(server, {"instances": [b64(GOOD)]})
    assert status == 200
    for one in idle:
        one.close()


def test_endless_trailers_close_the_connection(server):
    """The server would otherwise keep every line in memory."""
    host, port = server.rest.split("//")[1].split(":")
    head = "POST /v1/models/default:predict HTTP/1.1\r\nHost: a\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
    with socket.create_connection((host, int(port)), 60) as connection:
        connection.sendall(head.encode())
        with pytest.raises(ConnectionError):
            for i in range(100_000):
                connection.sendall(b"a%d: " % i + b"b" * 1000 + b"\r\n")


def test_an_empty_predict_request_is_rejected(server):
    stub = prediction_service_pb2_grpc.PredictionServiceStub
    with grpc.insecure_channel(server.grpc) as channel:
        with pytest.raises(grpc.RpcError) as error:
            stub(channel).Predict(predict_pb2.PredictRequest(), timeout=60)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


BODIES = [
    b'{"instances": [{"image_bytes": {"b64": "%s"}}]}' % base64.b64encode(GOOD),
    b'{"inputs": {"images": [[[[0.5, 1, 0]]]]}, "signature_name": "images"}',
    b'{"signature_name": "images_uint8", "instances": [[[[1, 2, 3]]]]}',
]
PIECES = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\u0000", b"1e999", b"-"]


def some_json():
    leaves = st.none() | st.booleans() | st.floats() | st.integers()
    leaves |= st.text(max_size=5) | st.just({"b64": "YQ=="})
    names = ["instances", "inputs", "signature_name", "image_bytes", "images"]
    values = st.recursive(
        leaves,
        lambda x: (
            st.lists(x, max_size=4)
            | st.dictionaries(st.sampled_from(names), x, max_size=4)
        ),
        max_leaves=20,
    )
    return values.map(lambda value: json.dumps(value).encode())


@st.composite
def mutated_bodies(draw):
    """A valid request with parts changed, removed or inserted."""
    body = bytearray(draw(st.sampled_from(BODIES)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(body)))
        end = at + draw(st.integers(0, 8))
        new = draw(st.binary(max_size=3) | st.sampled_from(PIECES))
        body[at:end] = new
    return bytes(body)


def fuzz(server, body):
    status, text = posted(server, body)
    assert status in (200, 400), (status, text)
    if status == 400:
        assert json.loads(text)["error"]


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(body=mutated_bodies() | some_json() | st.binary(max_size=50))
def test_no_body_is_too_odd(server, body):
    fuzz(server, body)


@pytest.mark.slow
@settings(
    max_examples=4_000, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(body=mutated_bodies() | some_json() | st.binary(max_size=50))
def test_thousands_of_odd_bodies_get_an_answer(server, body):
    fuzz(server, body)
