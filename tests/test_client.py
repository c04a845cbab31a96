import base64
import concurrent.futures
import contextlib
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import zlib

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from clsa_tf.data import headers
from clsa_tf.errors import UserError
from export.client import Client
from export.embedding import address
from export.embedding.address import ModelReference
from export.embedding.rejected import Gate, ModelError, embed_each
from tests import exports
from tests.runs import call, command
from tests.server import ServerProcess, models_config

PROTOCOLS = ("grpc", "http")
BAD = b"not an image"
HTTP = {  # as TensorFlow Serving translates them
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "INTERNAL": 500,
}


class Service:
    """Answers for servers of both protocols, and a record of their calls.

    Args:
        failures: statuses of the first answers.
        width: size of an embedding.
    """

    def __init__(self, failures=(), width=3):
        self.failures = list(failures)
        self.width = width
        self.calls_received = []
        self.seconds = 0.0  # for each answer
        self.dropped_rows = 0
        self.filters = []  # of outputs, by gRPC
        self.content = None  # of answers by REST, instead of the right one

    def embed(self, model, images):
        """Returns (status, message or rows)."""
        self.calls_received.append((model, len(images)))
        time.sleep(self.seconds)
        if self.failures:
            return self.failures.pop(0), "try\nlater."
        if model.name != "default":
            return "NOT_FOUND", f"Servable not found: {model.name}"
        if BAD in images:
            return "INVALID_ARGUMENT", f"image {images.index(BAD)} is none"
        rows = np.stack([expected(image, self.width) for image in images])
        return None, rows[self.dropped_rows :]


def expected(image, width=3):
    """Returns an embedding that differs from image to image."""
    return (
        np.random.default_rng(zlib.crc32(image))
        .normal(size=width)
        .astype(np.float32)
    )


SIGNATURE = """
  inputs {key: "image_bytes"
          value {dtype: DT_STRING tensor_shape {dim {size: -1}}}}
  outputs {key: "embedding"
           value {dtype: DT_FLOAT tensor_shape {dim {size: -1} dim {size: 3}}}}
  outputs {key: "projection"
           value {dtype: DT_FLOAT tensor_shape {dim {size: -1} dim {size: 3}}}}
"""
METADATA = {
    "model": "default",
    "version": 7,
    "signatures": {
        "serving_default": {
            "inputs": {"image_bytes": {"dtype": "DT_STRING", "shape": [-1]}},
            "outputs": {
                "embedding": {"dtype": "DT_FLOAT", "shape": [-1, 3]},
                "projection": {"dtype": "DT_FLOAT", "shape": [-1, 3]},
            },
        }
    },
}


class GrpcService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, service):
        self._service = service

    def Predict(self, request, context):
        spec = request.model_spec
        assert spec.signature_name == "serving_default"
        images = list(tf.make_ndarray(request.inputs["image_bytes"]))
        status, rows = self._service.embed(_model(spec), images)
        if status:
            context.abort(grpc.StatusCode[status], rows)
        self._service.filters.append(list(request.output_filter))
        response = predict_pb2.PredictResponse()
        for name in request.output_filter or ("embedding", "projection"):
            sign = -1 if name == "projection" else 1
            response.outputs[name].CopyFrom(tf.make_tensor_proto(sign * rows))
        return response

    def GetModelMetadata(self, request, context):
        assert list(request.metadata_field) == ["signature_def"]
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = request.model_spec.name
        response.model_spec.version.value = 7
        signatures = get_model_metadata_pb2.SignatureDefMap()
        signatures.signature_def["serving_default"].CopyFrom(_signature())
        signatures.signature_def["__saved_model_init_op"].SetInParent()
        response.metadata["signature_def"].Pack(signatures)
        return response


def _model(spec):
    version = spec.version.value if spec.HasField("version") else None
    return ModelReference(spec.name, version, spec.version_label or None)


def _signature():
    from google.protobuf import text_format
    from tensorflow.core.protobuf import meta_graph_pb2

    return text_format.Parse(SIGNATURE, meta_graph_pb2.SignatureDef())


class RestHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["signature_name"] == "serving_default"
        images = [
            base64.b64decode(x["b64"]) for x in body["inputs"]["image_bytes"]
        ]
        path, _, verb = self.path.rpartition(":")
        assert verb == "predict"
        model = address.parse(f"http://here{path}")[1]
        service = self.server.service
        status, rows = service.embed(model, images)
        if status:
            self._answer(HTTP[status], {"error": rows})
        elif service.width == 1:  # the only output has no name in REST
            self._answer(200, {"outputs": rows.tolist()})
        else:
            outputs = {"embedding": rows, "projection": -rows}
            outputs = {name: x.tolist() for name, x in outputs.items()}
            self._answer(200, {"outputs": outputs})

    def do_GET(self):
        from google.protobuf import json_format

        assert self.path.endswith("/metadata")
        signature = json_format.MessageToDict(
            _signature(), preserving_proto_field_name=True
        )
        if self.server.service.width == 1:
            del signature["outputs"]["projection"]
        found = {"signature_def": {"serving_default": signature}}
        self._answer(
            200,
            {
                "model_spec": {"name": "default", "version": "7"},
                "metadata": {"signature_def": found},
            },
        )

    def _answer(self, status, content):
        content = self.server.service.content or json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(protocol, service, port=0, tls=None):
    """Serves on loopback; yields the address.

    Args:
        tls: paths of the private key and the certificate; None: without TLS.
    """
    if protocol == "grpc":
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
            GrpcService(service), server
        )
        if tls:
            pair = tuple(path.read_bytes() for path in tls)
            port = server.add_secure_port(
                f"localhost:{port}", grpc.ssl_server_credentials([pair])
            )
        else:
            port = server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        try:
            place = f"grpcs://localhost:{port}"
            yield place if tls else f"grpc://127.0.0.1:{port}"
        finally:
            server.stop(0).wait()
        return
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", port), RestHandler
    ) as server:
        server.service = service
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls[1], tls[0])
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever).start()
        try:
            port = server.server_address[1]
            yield (
                f"https://localhost:{port}"
                if tls
                else f"http://127.0.0.1:{port}"
            )
        finally:
            server.shutdown()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(params=PROTOCOLS)
def protocol(request):
    return request.param


IMAGES = [b"one", b"two\0", b"\xff\0three", b"four", b"five"]


# ---- Python


def test_images_are_embedded_in_batches_and_in_order(protocol):
    service = Service()
    with serving(protocol, service) as server:
        with Client(server, batch_size=2) as client:
            rows = client.embed(IMAGES)
            some = client.embed(IMAGES[:1], outputs=["projection"])
    assert [count for _, count in service.calls_received] == [2, 2, 1, 1]
    if protocol == "grpc":  # only this output is sent
        assert service.filters == [[], [], [], ["projection"]]
    want = np.stack([expected(image) for image in IMAGES])
    assert set(rows) == {"embedding", "projection"}
    assert rows["embedding"].dtype == np.float32
    np.testing.assert_array_equal(rows["embedding"], want)
    np.testing.assert_array_equal(rows["projection"], -want)
    assert set(some) == {"projection"}
    np.testing.assert_array_equal(some["projection"], -want[:1])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A private key and a self-signed certificate for localhost."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
        + ["-keyout", key, "-out", certificate, "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True,
        capture_output=True,
    )
    return key, certificate


def test_tls_needs_a_trusted_certificate(protocol, certificate, tmp_path):
    service = Service()
    with serving(protocol, service, tls=certificate) as server:
        trusted = dict(certificates=str(certificate[1]))
        with Client(server, **trusted) as client:
            rows = client.embed(IMAGES)["embedding"]
        np.testing.assert_array_equal(
            rows, np.stack([expected(image) for image in IMAGES])
        )
        # An unknown certificate is not trusted, nor is a server without TLS.
        calls_received = len(service.calls_received)
        with Client(server, attempts=1, timeout=5) as client:
            with pytest.raises(ModelError):
                client.embed(IMAGES)
        assert len(service.calls_received) == calls_received
        with pytest.raises(UserError, match="TLS"):
            Client("localhost:1", **trusted)
        with pytest.raises(UserError, match="none.pem"):
            Client(server, certificates=str(tmp_path / "none.pem"))
        photo = tmp_path / "photo.jpg"
        photo.write_bytes(b"one")
        found = call(
            command(
                "export.client",
                f"--server={server}",
                f"--ca_certificates={certificate[1]}",
                photo,
            )
        )
        assert json.loads(found.stdout)["file"] == str(photo)


@pytest.mark.parametrize(
    "trusts, speaks_tls, words",
    [
        (False, True, "certificate.verify.failed"),
        (True, False, "wrong.version.number"),
    ],
    ids=["untrusted", "no TLS there"],
)
def test_a_failed_handshake_is_not_retried(
    protocol, certificate, trusts, speaks_tls, words
):
    service = Service()
    with serving(protocol, service, tls=speaks_tls and certificate) as server:
        scheme = {"grpc": "grpcs", "http": "https"}[protocol]
        client = Client(
            f"{scheme}://localhost:{server.rpartition(':')[2]}",
            certificates=str(certificate[1]) if trusts else "",
        )
        with client, pytest.raises(ModelError, match=f"(?i){words}") as e:
            client.embed(IMAGES)
    assert not e.value.transient and not e.value.rejected
    for word in ("expected TLS", "--ca_certificates", "localhost"):
        assert word in str(e.value)
    assert not service.calls_received


def test_a_certificate_for_another_name_is_not_retried(protocol, certificate):
    with serving(protocol, Service(), tls=certificate) as server:
        # The certificate is valid for localhost only.
        number = server.replace("localhost", "127.0.0.1")
        with Client(number, certificates=str(certificate[1])) as client:
            with pytest.raises(ModelError, match="(?i)hostname|IP ") as e:
                client.embed(IMAGES)
    assert not e.value.transient


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_an_interrupted_handshake_is_transient(scheme):
    """A proxy that restarts causes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.recv(2**16)
                    connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        server = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        with Client(server, attempts=1, timeout=5) as client:
            with pytest.raises(ModelError) as e:
                client.embed(IMAGES)
        listener.shutdown(socket.SHUT_RDWR)
    assert e.value.transient


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ],
    ids=["empty", "malformed"],
)
def test_invalid_certificates_are_rejected(scheme, content, tmp_path):
    path = tmp_path / "authority.pem"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^Expected a PEM .*{path}"):
        Client(f"{scheme}://localhost:1", certificates=str(path))


@pytest.mark.parametrize("status", ["UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_temporary_failures_are_retried(protocol, status):
    service = Service([status] * 2)
    with serving(protocol, service) as server, Client(server) as client:
        rows = client.embed(IMAGES)
    np.testing.assert_array_equal(rows["embedding"][1], expected(IMAGES[1]))
    assert len(service.calls_received) == 3


def test_attempts_are_limited(protocol):
    service = Service(["UNAVAILABLE"] * 9)
    with serving(protocol, service) as server:
        with Client(server, attempts=3) as client:
            with pytest.raises(ModelError, match="try later") as e:
                client.embed(IMAGES)
    assert len(service.calls_received) == 3
    assert e.value.status == "UNAVAILABLE" and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "status", ["INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL"]
)
def test_permanent_failures_are_not_retried(protocol, status):
    service = Service([status])
    with serving(protocol, service) as server, Client(server) as client:
        with pytest.raises(ModelError) as e:
            client.embed(IMAGES)
    assert len(service.calls_received) == 1
    assert e.value.rejected == (status == "INVALID_ARGUMENT")


def test_a_client_waits_for_a_server_that_starts_later(protocol):
    port = free_port()
    scheme = "grpc" if protocol == "grpc" else "http"
    server = f"{scheme}://127.0.0.1:{port}"
    with Client(server, attempts=1) as client:
        with pytest.raises(ModelError, match="refused") as e:
            client.embed(IMAGES)
    assert e.value.status == "UNAVAILABLE"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with Client(server, attempts=12) as client:
            rows = pool.submit(client.embed, IMAGES)
            time.sleep(0.5)
            with serving(protocol, Service(), port):
                assert len(rows.result()["embedding"]) == len(IMAGES)


def test_a_client_reconnects_to_a_restarted_server(protocol):
    with serving(protocol, Service()) as server:
        client = Client(server, attempts=12)
        client.embed(IMAGES)
    with serving(protocol, Service(), int(server.rpartition(":")[2])):
        with client:
            assert len(client.embed(IMAGES)["embedding"]) == len(IMAGES)


def test_an_attempt_takes_no_longer_than_the_timeout(protocol):
    service = Service()
    service.seconds = 3.0
    with serving(protocol, service) as server:
        with Client(server, timeout=0.2) as client:
            with pytest.raises(ModelError, match="--timeout") as e:
                client.embed(IMAGES)
    assert (
        e.value.status == "DEADLINE_EXCEEDED"
        and len(service.calls_received) == 1
    )


@pytest.mark.slow
def test_answers_above_the_default_limit_of_grpc_are_received(protocol):
    service = Service(width=2**18)  # of 4 bytes, for 5 images, twice
    with serving(protocol, service) as server, Client(server) as client:
        rows = client.embed(IMAGES)["embedding"]
    np.testing.assert_array_equal(rows[4], expected(IMAGES[4], 2**18))


def test_a_request_too_large_for_the_server_is_rejected():
    with serving("grpc", Service()) as server:
        with Client(server, attempts=2) as client:
            with pytest.raises(ModelError, match="larger than max") as e:
                client.embed([bytes(5 * 2**20)])
    assert e.value.rejected and "RESOURCE_EXHAUSTED" in str(e.value)


def test_versions_and_labels_are_sent(protocol):
    service = Service()
    with serving(protocol, service) as server:
        Client(server, version=5).embed(IMAGES)
        Client(server, label="canary").embed(IMAGES)
        client = Client(server)
        assert client.metadata() == METADATA
        client.embed(IMAGES)
        assert client.pin() == METADATA
        client.embed(IMAGES)
    assert [model for model, _ in service.calls_received] == [
        ModelReference("default", 5, None),
        ModelReference("default", None, "canary"),
        ModelReference("default", None, None),
        ModelReference("default", 7, None),
    ]
    with pytest.raises(UserError, match="5.*'canary'"):
        Client("here:1", version=5, label="canary")


def test_rest_does_not_name_an_only_output():
    with serving("http", Service(width=1)) as server:
        rows = Client(server).embed(IMAGES)
        assert rows.keys() == {"embedding"}
        rows = Client(server).embed(IMAGES, outputs=["embedding"])
    assert rows["embedding"].shape == (len(IMAGES), 1)


def test_answers_with_too_few_rows_are_errors(protocol):
    service = Service()
    service.dropped_rows = 1
    with serving(protocol, service) as server, Client(server) as client:
        with pytest.raises(ModelError, match=r"\[4, 3\].* 5 ") as e:
            client.embed(IMAGES)
    assert e.value.status == "INTERNAL"
    with pytest.raises(ValueError):
        Client(server).embed([])


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"outputs": ', b"1"])
def test_malformed_answers_are_errors(content):
    service = Service()
    service.content = content
    with serving("http", service) as server, Client(server) as client:
        with pytest.raises(ModelError, match=server) as e:
            client.embed(IMAGES)
    assert e.value.status == "INTERNAL"


@pytest.mark.parametrize(
    "server, expected",
    [
        ("here:8500", ("here:8500", None)),
        ("grpc://here:8500", ("here:8500", None)),
        ("grpc://[::1]:8500/photos", ("[::1]:8500", ModelReference("photos"))),
        ("http://here:8501/", ("http://here:8501", None)),
        ("https://here/proxy", ("https://here/proxy", None)),
        ("http://a/v1/models/m", ("http://a", ModelReference("m"))),
        (
            "http://a/p/v1/models/m/versions/3",
            ("http://a/p", ModelReference("m", 3)),
        ),
        (
            "http://a/v1/models/m/labels/new",
            ("http://a", ModelReference("m", None, "new")),
        ),
    ],
)
def test_addresses_are_parsed(server, expected):
    assert address.parse(server) == expected


@pytest.mark.parametrize(
    "server, expected",
    [
        ("http://here:8501/photos", "http://here:8501/v1/models/photos"),
        ("https://here/proxy/photos/", "https://here/proxy/v1/models/photos"),
        ("http://here:8501", "http://here:8501"),
        ("http://here/v1/models/m", "http://here/v1/models/m"),
        ("http://here/v1/models", "http://here/v1/models"),
        ("grpc://here:8500/photos", "grpc://here:8500/photos"),
    ],
)
def test_addresses_of_models_are_completed(server, expected):
    assert address.of_model(server) == expected


@pytest.mark.parametrize(
    "server",
    [
        "",
        "here:1/a/b",
        "grpc://",
        "ftp://here",
        "http://a/v1/model/m",
        "http://a/v1/models/m/versions/x",
        "http://a/v1/models/m:predict",
    ],
)
def test_invalid_addresses_are_rejected(server):
    with pytest.raises(UserError, match="grpc://host:port") as e:
        Client(server)
    assert repr(server) in str(e.value)


# ---- Bad images


def test_the_embedded_server_answers_as_the_model(protocol, exported):
    images = [exports.encode(x) for x in exports.noise(5)]
    with ServerProcess(f"--model_base_path={exported.base}") as server:
        place = server.grpc if protocol == "grpc" else server.rest
        with Client(place, batch_size=2) as client:
            rows = client.embed(images)
            described = client.metadata()
            with pytest.raises(ModelError, match="image 1") as e:
                client.embed([images[0], BAD])
            client.embed(images[:1])
        with pytest.raises(ModelError, match="other") as other:
            Client(place, model="other").embed(images)
        with pytest.raises(ModelError) as later:
            Client(place, version=2).embed(images)
    assert e.value.rejected
    assert other.value.status == later.value.status == "NOT_FOUND"
    assert described["version"] == 1 and described["model"] == "default"
    serving_default = described["signatures"]["serving_default"]
    assert serving_default["inputs"] == {
        "image_bytes": {"dtype": "DT_STRING", "shape": [-1]}
    }
    model = tf.saved_model.load(exported.path)
    want = model.signatures["serving_default"](tf.constant(images))
    assert set(rows) == set(want) == set(serving_default["outputs"])
    for name, value in want.items():
        np.testing.assert_allclose(rows[name], value, rtol=1e-4, atol=1e-5)


def test_only_bad_images_are_left_out(protocol):
    contents = [b"0", BAD, b"2", OSError(2, "gone"), b"4", b"5", BAD, BAD]
    service = Service()
    with serving(protocol, service) as server, Client(server) as client:
        rows, bad = embed_each(client.embed, contents)
    assert list(bad) == [1, 3, 6, 7] and bad[3] == "gone"
    assert "image 0 is none" in bad[1]
    want = np.stack([expected(contents[i]) for i in (0, 2, 4, 5)])
    np.testing.assert_array_equal(rows["embedding"], want)


class Joining(Service):
    """Fails overlapping requests together, as a batching server does."""

    def __init__(self):
        super().__init__()
        self._now = {}  # request -> images of all that overlap it
        self._lock = threading.Lock()

    def embed(self, model, images):
        number = object()
        with self._lock:
            self._now[number] = []
            for overlapping in self._now.values():
                overlapping += images
            for other in self._now.values():
                self._now[number] += other
        time.sleep(0.05)
        with self._lock:
            joined = self._now.pop(number)
        if BAD in joined:
            return "INVALID_ARGUMENT", "an image is none"
        return super().embed(model, images)


@pytest.mark.slow
def test_good_images_survive_bad_images_of_other_requests(protocol):
    batches = [[b"%d" % i, BAD if i % 2 else b"good"] for i in range(8)]
    gate = Gate(4)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        with serving(protocol, Joining()) as server, Client(server) as client:
            found = list(
                pool.map(lambda x: embed_each(client.embed, x, gate), batches)
            )
    for i, (rows, bad) in enumerate(found):
        assert list(bad) == ([1] if i % 2 else [])
        np.testing.assert_array_equal(rows["embedding"][0], expected(b"%d" % i))


def test_rows_marked_as_invalid_are_left_out():
    def embed(images):
        valid = np.array([image != BAD for image in images])
        rows = np.where(valid[:, None], [[1.0, 2.0]], np.nan)
        return {"embedding": rows, "valid": valid}

    rows, bad = embed_each(embed, [OSError(2, "gone"), b"1", BAD, b"3"])
    assert rows.keys() == {"embedding"} and list(bad) == [0, 2]
    np.testing.assert_array_equal(rows["embedding"], [[1, 2], [1, 2]])
    rows, bad = embed_each(embed, [BAD])
    assert len(rows["embedding"]) == 0 and list(bad) == [0]


def test_a_bad_image_is_found_by_bisection():
    calls = []

    def embed(images):
        calls.append(len(images))
        if BAD in images:
            raise ModelError("here", "INVALID_ARGUMENT", "bad")
        return {"embedding": np.zeros([len(images), 2])}

    rows, bad = embed_each(embed, [b"good"] * 40 + [BAD] + [b"good"] * 23)
    assert list(bad) == [40] and len(rows["embedding"]) == 63
    # Two calls with all images, and two for each bisection.
    assert len(calls) == 2 + 2 * 6


def test_other_errors_do_not_mark_images_as_bad():
    service = Service(["NOT_FOUND"])
    with serving("grpc", service) as server, Client(server) as client:
        with pytest.raises(ModelError):
            embed_each(client.embed, IMAGES)
    assert embed_each(client.embed, [OSError(2, "gone")]) == ({}, {0: "gone"})


# ---- The command


@pytest.fixture
def photographs(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(b"photo %d" % i)
    return paths


def ask(server, *arguments):
    return call(command("export.client", f"--server={server}", *arguments))


def failed(server, *arguments):
    """Returns the error message and the output of a call that fails."""
    result = call(
        command("export.client", f"--server={server}", *arguments), status=1
    )
    lines = result.stderr.splitlines()
    (sentence,) = [line for line in lines if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return sentence, result.stdout


@pytest.mark.slow
def test_the_command_prints_a_line_per_photograph(protocol, photographs):
    service = Service(["UNAVAILABLE"] * 2)
    with serving(protocol, service) as server:
        # Flags may also follow the photographs.
        result = ask(server, *photographs, "--batch_size=2")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["file"] for line in lines] == [*map(str, photographs)]
    assert not result.stderr
    for path, line in zip(photographs, lines):
        want = expected(path.read_bytes())
        np.testing.assert_array_equal(np.float32(line["embedding"]), want)
        np.testing.assert_array_equal(np.float32(line["projection"]), -want)
    assert len(service.calls_received) == 4


def test_the_command_writes_a_file(photographs, tmp_path):
    output = tmp_path / "e.npz"
    with serving("http", Service()) as server:
        ask(server, f"--output={output}", "--batch_size=2", *photographs)
        sentence, _ = failed(server, f"--output={output}", *photographs)
    assert f"{output};" in sentence and "--output" in sentence
    with np.load(output) as data:
        assert list(data["files"]) == [*map(str, photographs)]
        want = [expected(path.read_bytes()) for path in photographs]
        np.testing.assert_array_equal(data["embedding"], want)


def test_the_command_names_bad_photographs(photographs, tmp_path):
    photographs[1].write_bytes(BAD)
    missing = tmp_path / "missing.jpg"
    with serving("http", Service()) as server:
        sentence, printed = failed(
            server, "--batch_size=2", *photographs, missing
        )
    assert f"{photographs[1]} (HTTP 400: image 0 is none)" in sentence
    assert "2 of 4" in sentence
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["file"] for line in lines] == [
        *map(str, photographs),
        f"{missing}",
    ]
    assert ["error" in line for line in lines] == [False, True, False, True]
    assert lines[3]["error"] == "No such file or directory"


def test_the_command_prints_metadata():
    with serving("http", Service()) as server:
        assert json.loads(ask(server, "--metadata").stdout) == METADATA


def test_the_command_prints_the_cause_of_an_error(photographs):
    with serving("http", Service()) as server:
        sentence, _ = failed(server, "--model=other", *photographs)
        assert "HTTP 404: Servable not found: other" in sentence
        sentence, printed = failed(server)
        assert sentence and not printed
    unused_address = f"localhost:{free_port()}"
    sentence, _ = failed(unused_address, "--attempts=2", *photographs)
    assert "UNAVAILABLE" in sentence and unused_address in sentence
    sentence, _ = failed(server, "--output=x.txt", *photographs)
    assert ".parquet" in sentence


# --- with a server that has versions and labels ------------------------------


@pytest.fixture(scope="module")
def embedded(exported, tmp_path_factory):
    """The embedded server, in which version 1 has the label stable."""
    base = tmp_path_factory.mktemp("models")
    shutil.copytree(exported.path, base / "1")
    config = base / "models.config"
    label = 'version_labels { key: "stable" value: 1 }'
    config.write_text(models_config(photos=(base, label)))
    with ServerProcess(
        f"--model_config_file={config}",
        "--allow_version_labels_for_unavailable_models",
    ) as server:
        server.base = base
        yield server


def place(server, protocol):
    return server.grpc if protocol == "grpc" else server.rest


@pytest.mark.parametrize(
    "options, value",
    [
        ({"label": "none"}, "none"),
        ({"signature": "none"}, "none"),
        ({"version": 7}, "7"),
    ],
)
def test_missing_labels_signatures_and_versions_are_errors(
    embedded, protocol, options, value
):
    images = [exports.encode(image) for image in exports.noise(4)]
    server = place(embedded, protocol)
    with Client(server, model="photos", **options) as client:
        with pytest.raises(ModelError, match=rf"\b{value}\b") as caught:
            embed_each(client.embed, images)
    assert caught.value.status in ("NOT_FOUND", "FAILED_PRECONDITION")


def test_bad_images_are_reported_with_a_reason(embedded, protocol):
    images = [exports.encode(image) for image in exports.noise(4)]
    images[2] = images[2][:50]
    server = place(embedded, protocol)
    with Client(server, model="photos", label="stable") as client:
        rows, bad = embed_each(client.embed, images)
    assert rows["embedding"].shape[0] == 3
    assert bad == {2: headers.reasons(headers.DEFAULT)[headers.DAMAGED]}


def test_status_lists_versions(embedded, protocol, capsys):
    server = place(embedded, protocol)
    with Client(server, model="photos") as client:
        found = client.status()
        assert found[-1]["version"] == 1
        assert found[0]["state"] == "AVAILABLE" and found[0]["error"] == ""
    with Client(server, model="none") as client:
        with pytest.raises(ModelError, match=r"\bnone\b") as caught:
            client.status()
    assert caught.value.status == "NOT_FOUND"


def test_a_replaced_version_is_reported(embedded, protocol):
    """(This test adds versions, so it is the last one of this server.)"""
    base, image = embedded.base, exports.encode(exports.noise(1)[0])
    with Client(place(embedded, protocol), model="photos") as client:
        version = client.pin()["version"]
        client.embed([image])
        draft = shutil.copytree(base / "1", base / "draft")
        draft.rename(base / str(version + 1))
        embedded.wait_for_error(f"unloaded version {version} ")
        with pytest.raises(ModelError) as caught:
            client.embed([image])
    assert caught.value.status == "NOT_FOUND"
    for value in ("'photos'", f"version {version}", f"version {version + 1}"):
        assert value in str(caught.value)
