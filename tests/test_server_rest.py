"""The REST API of a real server process."""

import base64
import concurrent.futures
import gzip
import itertools
import json
import re
import shutil
import socket

import numpy as np
import pytest
import requests

from tests import exports
from tests.server import (
    ServerProcess,
    models_config,
    monitoring_flag,
    predict,
    request,
    write_toy,
)

IMAGES = [exports.encode(image) for image in exports.noise(2)]
LIMIT = 400_000  # bytes of a request
LABELS = 'version_labels { key: "stable" value: 1 } '
ALL = "model_version_policy { all {} } "
DEFAULT = "/v1/models/default"


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory):
    """Serves the export as versions 1 and 2, and the toys."""
    folder = tmp_path_factory.mktemp("served")
    for version in ("1", "2"):
        shutil.copytree(exported.path, folder / "base" / version)
    write_toy(folder / "toys" / "1")
    config = folder / "models.config"
    config.write_text(
        models_config(
            default=(folder / "base", ALL + LABELS),
            toy=(folder / "toys", ""),
        )
    )
    with ServerProcess(
        f"--model_config_file={config}",
        monitoring_flag(folder),
        "--allow_version_labels_for_unavailable_models",
        f"--max_request_bytes={LIMIT}",
        "--rest_api_timeout_in_ms=5000",
    ) as process:
        process.next_served()
        process.wait_for_error("loaded version 1 of default")
        yield process


def encoded(data):
    return {"b64": base64.b64encode(data).decode()}


def post(server, body, path=f"{DEFAULT}:predict", **options):
    """Sends JSON, or bytes unchanged."""
    data = body if isinstance(body, bytes) else json.dumps(body)
    return requests.post(server.rest + path, data=data, timeout=60, **options)


def get(server, path):
    return requests.get(server.rest + path, timeout=60)


def assert_alive(server):
    answer = post(server, {"instances": [encoded(IMAGES[0])]})
    assert answer.status_code == 200
    assert np.isfinite(answer.json()["predictions"][0]["embedding"]).all()
    assert "Traceback" not in server.errors()


def rows(answer):
    """Predictions as columns."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()["predictions"]
    return {name: np.float32([row[name] for row in found]) for name in found[0]}


def columns(answer):
    assert answer.status_code == 200, answer.text
    found = answer.json()["outputs"]
    return {name: np.float32(column) for name, column in found.items()}


FILES = [encoded(image) for image in IMAGES]
PIXELS = (exports.noise(2, size=8) / 255.0).round(4).tolist()
WHOLE = exports.noise(2, size=8).tolist()


@pytest.mark.parametrize(
    "signature, name, value",
    [
        ("serving_default", "image_bytes", FILES),
        ("images", "images", PIXELS),
        ("images_uint8", "images", WHOLE),
    ],
)
def test_all_forms_of_requests_get_the_answers_of_grpc(
    server, signature, name, value
):
    tensor = value
    if signature == "serving_default":
        tensor = np.array(IMAGES, object)
    elif signature == "images":
        tensor = np.float32(value)
    else:
        tensor = np.uint8(value)
    _, expected = predict(server.grpc, request({name: tensor}, signature))
    named = {"signature_name": signature}
    for found in (
        rows(post(server, named | {"instances": value})),
        rows(post(server, named | {"instances": [{name: v} for v in value]})),
        columns(post(server, named | {"inputs": value})),
        columns(post(server, named | {"inputs": {name: value}})),
    ):
        assert found.keys() == expected.keys()
        for key in expected:
            np.testing.assert_allclose(
                found[key], expected[key], rtol=1e-4, atol=1e-5
            )


def test_several_inputs_of_all_types_are_transmitted(server):
    numbers = [[0.5, float("nan")], [float("-inf"), 2.0]]
    sent = {
        "numbers": numbers,
        "count": [2**62, -1],
        "flag": [True, False],
        "some_bytes": [encoded(b"\xff\0"), "text"],
    }
    returned = dict(sent, some_bytes=[encoded(b"\xff\0"), encoded(b"text")])
    path = "/v1/models/toy:predict"
    named = {"signature_name": "echo"}
    answer = post(server, named | {"inputs": sent}, path)
    np.testing.assert_equal(answer.json()["outputs"], returned)
    assert "NaN" in answer.text and "-Infinity" in answer.text
    by_row = [dict(zip(sent, row)) for row in zip(*sent.values())]
    answer = post(server, named | {"instances": by_row}, path)
    expected = [dict(zip(returned, row)) for row in zip(*returned.values())]
    np.testing.assert_equal(answer.json()["predictions"], expected)


def test_a_single_output_has_no_name(server):
    path = "/v1/models/toy:predict"
    answer = post(server, {"instances": [0.0, 0.25]}, path)
    assert answer.json() == {"predictions": [0.0, 0.25]}
    answer = post(server, {"inputs": [0.0]}, path)
    assert answer.json() == {"outputs": [0.0]}


def test_status_lists_the_versions(server):
    found = get(server, DEFAULT).json()["model_version_status"]
    ok = {"error_code": "OK", "error_message": ""}
    assert found == [
        {"version": version, "state": "AVAILABLE", "status": ok}
        for version in ("2", "1")
    ]
    (one,) = get(server, DEFAULT + "/versions/1").json()["model_version_status"]
    assert one["version"] == "1"
    # As in TensorFlow Serving, labels are ignored, even unknown ones.
    for label in ("stable", "none"):
        answer = get(server, f"{DEFAULT}/labels/{label}").json()
        assert answer == {"model_version_status": found}


@pytest.mark.parametrize(
    "path, version", [("", "2"), ("/versions/1", "1"), ("/labels/stable", "1")]
)
def test_versions_and_labels_select_metadata_and_predictions(
    server, path, version
):
    found = get(server, f"{DEFAULT}{path}/metadata").json()
    assert found["model_spec"]["name"] == "default"
    assert found["model_spec"]["version"] == version
    signatures = found["metadata"]["signature_def"]["signature_def"]
    info = signatures["serving_default"]["inputs"]["image_bytes"]
    assert info["dtype"] == "DT_STRING"
    assert info["tensor_shape"]["dim"] == [{"size": "-1", "name": ""}]
    answer = post(server, {"instances": FILES}, f"{DEFAULT}{path}:predict")
    assert rows(answer)["embedding"].shape[0] == 2


DEEP = b'{"instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
RAGGED = {"signature_name": "images", "inputs": [[[[1, 2, 3]]], [[[1, 2]]]]}
BODIES = {
    "empty": (b"", "JSON Parse error"),
    "cut": (b'{"instances": [', "JSON Parse error"),
    "more": (b'{"instances": [1]} {}', "JSON Parse error"),
    "list": (b"[1]", "Is not object"),
    "number": (b"1", "Is not object"),
    "nan": (b"NaN", "Is not object"),
    "nan_instances": (b'{"instances": NaN}', "a list with"),
    "nan_bytes": (b'{"instances": [NaN]}', "expected type: string"),
    "nan_pixel": (
        b'{"signature_name": "images", "instances": [[[[NaN, 0, 0]]]]}',
        "image 0",
    ),
    "deep": (DEEP, "JSON Parse error"),
    "deep_lists": (
        b'{"signature_name": "images", "inputs": '
        + b"[" * 500
        + b"]" * 500
        + b"}",
        "a list is not",
    ),
    "digits": (b'{"inputs": ' + b"9" * 10_000 + b"}", ""),
    "large_integer": (
        b'{"signature_name": "images", "inputs": [' + b"9" * 400 + b"]}",
        "too large",
    ),
    "surrogate": (b'{"inputs": ["\\ud800"]}', "surrogate"),
    "surrogate_name": (b'{"inputs": {"\\ud800": 1}}', "image_bytes"),
    "not_utf8": (b'{"inputs": ["\xff"]}', "image 0"),
    "utf16": ('{"inputs": ["a"]}'.encode("utf-16"), "JSON"),
    "neither": ({}, "one of 'inputs' or 'instances'"),
    "both": ({"inputs": FILES, "instances": FILES}, "one of"),
    "no_rows": ({"instances": []}, "list with values"),
    "no_list": ({"instances": {"image_bytes": "a"}}, "a list with"),
    "signature": (
        {"signature_name": "none", "instances": FILES},
        "not found",
    ),
    "signature_type": (
        {"signature_name": 5, "instances": FILES},
        "must be a string",
    ),
    "name": ({"inputs": {"photo": FILES}}, "image_bytes"),
    "extra_in_row": (
        {"instances": [{"image_bytes": FILES[0], "photo": 1}]},
        "element: 0",
    ),
    "name_in_row": ({"instances": [{"photo": FILES[0]}]}, "element: 0"),
    "mixed_rows": (
        {"instances": [{"image_bytes": FILES[0]}, FILES[1]]},
        "element: 1",
    ),
    "objects_later": ({"instances": [FILES[0], {"x": "a"}]}, "base64"),
    "base64": ({"instances": [{"b64": "a*bc"}]}, "image_bytes"),
    "padding": ({"instances": [{"b64": "QUJD="}]}, "padding"),
    "url_safe": ({"instances": [{"b64": "_-_-"}]}, "image_bytes"),
    "not_ascii": ({"instances": [{"b64": "YQ=ä"}]}, "image_bytes"),
    "b64_type": ({"instances": [{"b64": 1}]}, ""),
    "null": ({"instances": [None]}, "expected type"),
    "no_image": ({"instances": [encoded(b"text")]}, "image 0"),
    "no_bytes": ({"instances": [FILES[0], ""]}, "image 1"),
    "truncated": ({"instances": [encoded(IMAGES[0][:60])]}, "image 0"),
    "string": ({"signature_name": "images", "inputs": ["1.0"]}, "float"),
    "bool": ({"signature_name": "images", "inputs": [[True, 1]]}, "float"),
    "range": ({"signature_name": "images_uint8", "inputs": [256]}, "uint8"),
    "fraction": ({"signature_name": "images_uint8", "inputs": [0.5]}, "uint8"),
    "ragged": (RAGGED, "a list is not"),
    "rank": ({"signature_name": "images", "inputs": [1.0]}, "shape"),
    "items": ({"instances": ["x"] * 257}, "257"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies_are_rejected_with_the_reason(server, name):
    body, reason = BODIES[name]
    answer = post(server, body)
    assert answer.status_code == 400, answer.text
    assert answer.json().keys() == {"error"}
    assert reason in answer.json()["error"], answer.text
    assert_alive(server)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("POST", "/v1/models/none:predict", 404),
        ("POST", f"{DEFAULT}/versions/9:predict", 404),
        ("POST", f"{DEFAULT}/labels/none:predict", 400),
        ("POST", f"{DEFAULT}/versions/{'9' * 5000}:predict", 400),
        ("POST", f"{DEFAULT}/versions/one:predict", 400),
        ("POST", f"{DEFAULT}/versions/1/labels/stable:predict", 400),
        ("POST", "/v1/models/..:predict", 404),
        ("POST", "/v1/models/%2e%2e%2fdefault:predict", 404),
        ("POST", "/v1/models/../../etc/passwd:predict", 400),
        ("POST", "/v1/models/default%00:predict", 404),
        ("POST", "/v1/models/default%0a:predict", 404),
        ("POST", "/v1/models/%ff%fe:predict", 404),
        ("POST", "/v1/models//default:predict", 400),
        ("POST", f"/v1/models/{'m' * 20_000}:predict", 404),
        ("POST", f"{DEFAULT}:classify", 400),
        ("POST", "/v1/models/none:regress", 404),
        ("POST", f"{DEFAULT}:PREDICT", 400),
        ("POST", f"{DEFAULT}:explain", 400),
        ("POST", "/v1/models:predict", 400),
        ("GET", "/v1/models", 400),
        ("GET", "/v1/models/none", 404),
        ("GET", f"{DEFAULT}/versions/9", 404),
        ("GET", f"{DEFAULT}/versions/9/metadata", 404),
        ("GET", "/v1/models/none/metadata", 404),
        ("GET", "/v1/", 400),
        ("GET", "/", 404),
        ("GET", "/favicon.ico", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", f"{DEFAULT}:predict", 400),
        ("GET", f"{DEFAULT}?x=1", 404),
        ("PUT", f"{DEFAULT}:predict", 400),
        ("DELETE", DEFAULT, 400),
        ("POST", DEFAULT, 400),
        ("POST", f"{DEFAULT}/metadata", 400),
        ("PUT", "/metrics", 400),
        ("GET", "/metrics?x=1", 400),
    ],
)
def test_wrong_paths_and_methods_are_rejected(server, method, path, status):
    message = requests.Request(method, server.rest, data=b"{}").prepare()
    message.url = server.rest + path  # unchanged
    with requests.Session() as session:
        answer = session.send(message, timeout=60)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]
    assert_alive(server)


def test_names_of_the_api_are_case_insensitive(server):
    """Except for the last part, as in TensorFlow Serving."""
    for path in ("metadata", "METADATA"):
        found = get(server, f"/V1/Models/default/{path}")
        assert found.status_code == 200
        assert ("metadata" in found.json()) == (path == "metadata")


@pytest.mark.parametrize(
    "head, status",
    [
        (f"GET {DEFAULT} HTTP/1.1\r\n\r\n", 200),  # no Host
        (f"GET {DEFAULT} HTTP/1.0\r\n\r\n", 200),
        (f"GET http://x:8501{DEFAULT} HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (f"GET {DEFAULT}%zz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (f"GET {DEFAULT}#a HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (
            f"OPTIONS {DEFAULT}:predict HTTP/1.1\r\nHost: x\r\n"
            "Origin: https://x\r\n\r\n",
            200,
        ),
        (f"OPTIONS {DEFAULT}:predict HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (
            f"GET {DEFAULT} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            "Upgrade: h2c\r\n\r\n",
            200,
        ),
        (
            f"POST {DEFAULT}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5"
            "\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nhello",
            400,
        ),
    ],
)
def test_unusual_heads_of_requests_get_their_status(server, head, status):
    assert first_status(server, head.encode()) == status


def raw(server, data, wait=True):
    """Sends bytes; returns the answer, until the connection is closed."""
    host, port = server.rest[len("http://") :].split(":")
    with socket.create_connection((host, int(port)), 60) as connection:
        connection.sendall(data)
        if not wait:
            return b""
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def first_status(server, data):
    host, port = server.rest[len("http://") :].split(":")
    with socket.create_connection((host, int(port)), 60) as connection:
        connection.sendall(data)
        return int(connection.recv(2**16).split(b" ")[1])


def test_pipelined_requests_are_answered_in_turn(server):
    """(They terminate TensorFlow Serving 2.15.1.)"""
    good = f"GET {DEFAULT} HTTP/1.1\r\nHost: x\r\n"
    last = "GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    found = raw(server, f"{good}\r\n{good}\r\n{last}".encode())
    statuses = re.findall(rb"HTTP/1.1 (\d+) ", found)
    assert statuses == [b"200", b"200", b"404"]


HEAD = f"POST {DEFAULT}:predict HTTP/1.1\r\nHost: x\r\n".encode()


@pytest.mark.parametrize("size", [LIMIT + 1, 3 * LIMIT])
@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_rejected(server, size, chunked):
    body = bytes(size)
    if chunked:
        body = itertools.repeat(bytes(10_000), size // 10_000 + 1)
    answer = requests.post(
        f"{server.rest}{DEFAULT}:predict", data=body, timeout=60
    )
    assert answer.status_code == 413
    assert str(LIMIT) in answer.json()["error"]
    assert_alive(server)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"x: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
    ids=["bytes", "cut", "negative", "twice", "chunk", "header"],
)
def test_invalid_http_is_rejected(server, data):
    try:
        assert b" 400 " in raw(server, data)
    except OSError:
        pass  # closed while we still send
    assert_alive(server)


def test_compressed_and_chunked_bodies_are_read(server):
    body = json.dumps({"instances": FILES}).encode()
    expected = post(server, body).json()
    zipped = gzip.compress(body)
    headers = {"Content-Encoding": "gzip"}
    assert post(server, zipped, headers=headers).json() == expected
    pieces = iter([body[:100], body[100:]])
    answer = requests.post(f"{server.rest}{DEFAULT}:predict", data=pieces)
    assert answer.json() == expected
    bomb = gzip.compress(b" " * (LIMIT + 1) + body)
    assert post(server, bomb, headers=headers).status_code == 413
    for damaged in (zipped[:-9], zipped[:20], b"", body):
        answer = post(server, damaged, headers=headers)
        assert answer.status_code == 400
        assert "document is empty" in answer.json()["error"]
    assert post(server, zipped).status_code == 400  # without the header
    assert_alive(server)


def test_clients_that_disconnect_do_no_harm(server):
    for _ in range(20):
        raw(server, HEAD + b"Content-Length: 100\r\n\r\nabc", wait=False)
    assert_alive(server)


def test_slow_bodies_and_slow_models_time_out(server):
    """After 5 s, by --rest_api_timeout_in_ms."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        slow = pool.submit(
            post, server, {"instances": [7.0]}, "/v1/models/toy:predict"
        )
        host, port = server.rest[len("http://") :].split(":")
        with socket.create_connection((host, int(port)), 60) as connection:
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\nabc")
            assert b" 504 " in connection.recv(2**16)
        assert slow.result().status_code == 504
    assert_alive(server)


def counted(server, path="/metrics"):
    """Returns name with labels -> value."""
    answer = get(server, path)
    assert answer.status_code == 200
    lines = answer.text.splitlines()
    return {
        name: float(value)
        for name, value in (
            line.rsplit(" ", 1) for line in lines if not line.startswith("#")
        )
    }


def test_metrics_count_requests(server):
    def name(api, method, code, model):
        return (
            f'serving_requests_total{{api="{api}",code="{code}",'
            f'method="{method}",model="{model}"}}'
        )

    names = {
        name("rest", "predict", "OK", "default"): 3,
        name("grpc", "Predict", "OK", "default"): 1,
        name("rest", "predict", "NOT_FOUND", "other"): 2,
    }
    before = counted(server)
    for _ in range(3):
        assert_alive(server)
    predict(server.grpc, request({"image_bytes": [IMAGES[0]]}))
    for model in ("one", "two"):  # unknown names share a series
        post(server, b"{}", f"/v1/models/{model}:predict")
    after = counted(server, "/monitoring/prometheus/metrics")
    for key, least in names.items():
        assert after[key] >= before.get(key, 0) + least, key
    state = 'serving_version_state{model="default",state="AVAILABLE",version='
    assert after[state + '"1"}'] == after[state + '"2"}'] == 1
    assert after["process_start_time_seconds"] > 0
    assert after['serving_load_seconds_bucket{le="+Inf"}'] >= 3
