"""The gRPC services of a real server process."""

import concurrent.futures
import shutil

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

from tests import exports
from tests.server import (
    ServerProcess,
    models_config,
    outcome,
    predict,
    request,
    write_toy,
)

LABELS = 'version_labels { key: "stable" value: 1 } '
ALL = "model_version_policy { all {} } "
IMAGE = exports.encode(exports.noise(1)[0])


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Base path of a model with one version."""
    base = tmp_path_factory.mktemp("toys")
    write_toy(base / "1")
    return base


@pytest.fixture(scope="module")
def server(exported, toys, tmp_path_factory):
    """Serves the export as versions 1 and 2, and the toys."""
    folder = tmp_path_factory.mktemp("served")
    for version in ("1", "2"):
        shutil.copytree(exported.path, folder / "base" / version)
    config = folder / "models.config"
    config.write_text(
        models_config(default=(folder / "base", ALL + LABELS), toy=(toys, ""))
    )
    with ServerProcess(
        f"--model_config_file={config}",
        "--allow_version_labels_for_unavailable_models",
        "--enable_grpc_healthcheck_service",
        "--max_num_load_retries=0",
        "--max_concurrent_requests=6",
        "--max_request_bytes=1000000",
    ) as process:
        process.next_served()
        process.wait_for_error("version 1 of default")
        process.config = config
        yield process


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def model(exported):
    return tf.saved_model.load(exported.path)


def good():
    return request({"image_bytes": [IMAGE]})


def assert_alive(server):
    _, outputs = predict(server.grpc, good())
    assert np.isfinite(outputs["embedding"]).all()
    assert server.is_alive()


@pytest.mark.parametrize(
    "signature, inputs",
    [
        (
            "",
            {
                "image_bytes": [
                    IMAGE,
                    exports.encode(exports.noise(1)[0], "BMP"),
                ]
            },
        ),
        ("images", {"images": np.float32(exports.noise(3) / 255.0)}),
        ("images_uint8", {"images": exports.noise(5)}),
    ],
)
def test_answers_equal_those_of_the_saved_model(
    server, model, signature, inputs
):
    function = model.signatures[signature or "serving_default"]
    expected = function(**{k: tf.constant(v) for k, v in inputs.items()})
    spec, outputs = predict(server.grpc, request(inputs, signature))
    assert (spec.name, spec.version.value) == ("default", 2)
    assert spec.signature_name == (signature or "serving_default")
    assert outputs.keys() == expected.keys() == {"embedding", "projection"}
    for name, value in expected.items():
        assert outputs[name].dtype == np.float32
        np.testing.assert_allclose(outputs[name], value, rtol=1e-4, atol=1e-5)


def test_versions_and_labels_select_a_version(server):
    for choice, version in (
        ({}, 2),
        ({"version": 1}, 1),
        ({"version": 2}, 2),
        ({"label": "stable"}, 1),
    ):
        message = request({"image_bytes": [IMAGE]}, **choice)
        spec, _ = predict(server.grpc, message)
        assert spec.version.value == version


def test_outputs_are_filtered(server):
    message = good()
    message.output_filter.append("projection")
    _, outputs = predict(server.grpc, message)
    assert outputs.keys() == {"projection"}


def test_values_are_in_the_field_that_tensorflow_serving_uses(channel):
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    proto = stub.Predict(good(), timeout=60).outputs["projection"]
    assert not proto.tensor_content
    assert len(proto.float_val) == proto.tensor_shape.dim[1].size


def test_all_types_are_transmitted(server):
    inputs = {
        "numbers": np.float32([[0.5, np.nan], [np.inf, 2]]),
        "count": np.int64([2**62, -1]),
        "flag": np.array([True, False]),
        "some_bytes": np.array([b"a\0", b""], object),
    }
    _, outputs = predict(server.grpc, request(inputs, "echo", "toy"))
    assert outputs.keys() == inputs.keys()
    for name, value in inputs.items():
        np.testing.assert_array_equal(outputs[name], value)


def test_metadata_describes_the_signatures(channel, model):
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    message = get_model_metadata_pb2.GetModelMetadataRequest()
    message.model_spec.name = "default"
    message.model_spec.version_label = "stable"
    message.metadata_field.append("signature_def")
    response = stub.GetModelMetadata(message, timeout=60)
    assert response.model_spec.version.value == 1
    found = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(found)
    assert set(model.signatures) <= set(found.signature_def)
    info = found.signature_def["images"].inputs["images"]
    assert info.dtype == types_pb2.DT_FLOAT
    message.metadata_field[0] = "everything"
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetModelMetadata(message, timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_status_lists_the_versions(channel):
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    message = get_model_status_pb2.GetModelStatusRequest()
    message.model_spec.name = "default"
    found = stub.GetModelStatus(message, timeout=60).model_version_status
    available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
    assert {s.version: s.state for s in found} == {1: available, 2: available}
    message.model_spec.version_label = "stable"  # is ignored
    found = stub.GetModelStatus(message, timeout=60).model_version_status
    assert len(found) == 2
    message.model_spec.version.value = 7
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetModelStatus(message, timeout=60)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_health_is_reported_per_service(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "PredictionService", "ModelService"):
        message = health_pb2.HealthCheckRequest(service=service)
        assert stub.Check(message, timeout=60).status == 1  # SERVING
    message.service = "tensorflow.serving.PredictionService"
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(message, timeout=60)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_the_models_can_be_changed(channel, server, toys, tmp_path):
    """By HandleReloadConfigRequest."""
    call = channel.unary_unary(
        "/tensorflow.serving.ModelService/HandleReloadConfigRequest",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=(
            model_management_pb2.ReloadConfigResponse.FromString
        ),
    )
    before = text_format.Parse(
        server.config.read_text(), model_server_config_pb2.ModelServerConfig()
    )
    message = model_management_pb2.ReloadConfigRequest(config=before)
    message.config.model_config_list.config.add(
        name="more", base_path=str(toys), model_platform="tensorflow"
    )
    assert call(message, timeout=60).status.error_code == 0
    toy = request({"seconds": np.float32([0.0])}, model="more")
    assert outcome(server, toy) == "OK"
    # A label in use does not move to a version that is not loaded.
    message.config.model_config_list.config[0].version_labels["stable"] = 9
    with pytest.raises(
        grpc.RpcError, match="'stable'.*'default'.* 9"
    ) as caught:
        call(message, timeout=60)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    message = request({"image_bytes": [IMAGE]}, label="stable")
    assert predict(server.grpc, message)[0].version.value == 1
    # A model that cannot be loaded is accepted, and reported.
    (tmp_path / "1").mkdir()
    message = model_management_pb2.ReloadConfigRequest(config=before)
    message.config.model_config_list.config.add(
        name="bad", base_path=str(tmp_path), model_platform="tensorflow"
    )
    with pytest.raises(grpc.RpcError, match="'bad'") as caught:
        call(message, timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNKNOWN
    call(model_management_pb2.ReloadConfigRequest(config=before), timeout=60)
    assert outcome(server, toy) == "NOT_FOUND"
    assert_alive(server)


def proto(dtype=types_pb2.DT_FLOAT, shape=(1, 2, 2, 3), **fields):
    """Returns a request for `images` with a `TensorProto` of these fields."""
    message = predict_pb2.PredictRequest()
    message.model_spec.name = "default"
    message.model_spec.signature_name = "images"
    tensor = message.inputs["images"]
    tensor.CopyFrom(tensor_pb2.TensorProto(dtype=dtype, **fields))
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    return message


def unknown_rank():
    message = proto(shape=())
    message.inputs["images"].tensor_shape.unknown_rank = True
    return message


def many_inputs():
    message = good()
    for number in range(2000):
        message.inputs[str(number)].dtype = 1
    return message


BAD = {
    "model": ("NOT_FOUND", request({"x": [1.0]}, model="none")),
    "path": ("NOT_FOUND", request({"x": [1.0]}, model="../default")),
    "long": ("NOT_FOUND", request({"x": [1.0]}, model="m" * 10_000)),
    "version": ("NOT_FOUND", request({"image_bytes": [IMAGE]}, version=9)),
    "negative": ("NOT_FOUND", request({"image_bytes": [IMAGE]}, version=-1)),
    "label": ("INVALID_ARGUMENT", request({"image_bytes": [IMAGE]}, label="x")),
    "no_name": (
        "INVALID_ARGUMENT",
        request({"image_bytes": [IMAGE]}, model=""),
    ),
    "no_spec": ("INVALID_ARGUMENT", predict_pb2.PredictRequest()),
    "signature": (
        "FAILED_PRECONDITION",
        request({"image_bytes": [IMAGE]}, "none"),
    ),
    "no_input": ("INVALID_ARGUMENT", request({})),
    "other_input": ("INVALID_ARGUMENT", request({"images": [IMAGE]})),
    "two_inputs": (
        "INVALID_ARGUMENT",
        request({"image_bytes": [IMAGE], "more": [1]}),
    ),
    "many_inputs": ("INVALID_ARGUMENT", many_inputs()),
    "no_rows": (
        "INVALID_ARGUMENT",
        request({"image_bytes": np.zeros([0], object)}),
    ),
    "type": ("INVALID_ARGUMENT", request({"image_bytes": [1.5]})),
    "rank": ("INVALID_ARGUMENT", request({"image_bytes": [[IMAGE]]})),
    "channels": (
        "INVALID_ARGUMENT",
        request({"images": np.zeros([1, 8, 8, 4], np.float32)}, "images"),
    ),
    "not_an_image": ("INVALID_ARGUMENT", request({"image_bytes": [b"text"]})),
    "truncated": ("INVALID_ARGUMENT", request({"image_bytes": [IMAGE[:50]]})),
    "empty": ("INVALID_ARGUMENT", request({"image_bytes": [IMAGE, b""]})),
    "nan": (
        "INVALID_ARGUMENT",
        request({"images": np.full([1, 8, 8, 3], np.nan, "f")}, "images"),
    ),
    "items": ("INVALID_ARGUMENT", request({"image_bytes": [b"x"] * 10_000})),
    "too_large": (
        "RESOURCE_EXHAUSTED",
        request({"image_bytes": [bytes(2_000_000)]}),
    ),
    # Messages that contradict themselves.
    "content": ("INVALID_ARGUMENT", proto(tensor_content=b"123")),
    "huge": ("INVALID_ARGUMENT", proto(shape=(2**40,) * 3, float_val=[1.0])),
    "filled": ("INVALID_ARGUMENT", proto(shape=(1, 2**15, 2**15, 3))),
    "hollow": ("INVALID_ARGUMENT", proto(shape=(0, 2**40, 2**40, 3))),
    "negative_size": ("INVALID_ARGUMENT", proto(shape=(-1, 8, 8, 3))),
    "unknown_rank": ("INVALID_ARGUMENT", unknown_rank()),
    "dimensions": ("INVALID_ARGUMENT", proto(shape=(1,) * 300)),
    "no_type": ("INVALID_ARGUMENT", proto(dtype=0)),
    "odd_type": ("INVALID_ARGUMENT", proto(dtype=types_pb2.DT_VARIANT)),
    "new_type": ("INVALID_ARGUMENT", proto(dtype=9999)),
    "strings": (
        "INVALID_ARGUMENT",
        proto(dtype=types_pb2.DT_STRING, shape=(9,), string_val=[b"x"]),
    ),
}


def test_values_beyond_the_shape_are_ignored(server):
    """As in TensorFlow Serving."""
    message = proto(float_val=[0.5] * 13)
    assert outcome(server, message) == "OK"


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_their_codes(server, name):
    code, message = BAD[name]
    with pytest.raises(grpc.RpcError) as caught:
        predict(server.grpc, message)
    assert caught.value.code().name == code, caught.value.details()
    assert caught.value.details()
    assert "Traceback" not in server.errors()
    assert_alive(server)


def test_a_bad_image_is_named(server):
    message = request({"image_bytes": [IMAGE, IMAGE, b"text"]})
    with pytest.raises(grpc.RpcError, match="image 2"):
        predict(server.grpc, message)


def test_bytes_that_are_not_a_message_are_rejected(channel):
    call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff", timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_classify_rejects_an_unknown_model(channel):
    call = channel.unary_unary("/tensorflow.serving.PredictionService/Classify")
    spec = predict_pb2.PredictRequest()  # has its ModelSpec in the same place
    spec.model_spec.name = "none"
    with pytest.raises(grpc.RpcError) as caught:
        call(spec.SerializeToString(), timeout=60)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "method, code",
    [
        ("PredictionService/Classify", "INVALID_ARGUMENT"),
        ("PredictionService/Regress", "INVALID_ARGUMENT"),
        ("PredictionService/MultiInference", "INVALID_ARGUMENT"),
        ("PredictionService/PredictStreamed", "UNIMPLEMENTED"),
        ("SessionService/SessionRun", "UNIMPLEMENTED"),
    ],
)
def test_unsupported_methods_are_rejected(channel, method, code):
    call = channel.unary_unary(f"/tensorflow.serving.{method}")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=60)
    assert caught.value.code().name == code


def wait_for(seconds):
    return request({"seconds": np.float32([seconds])}, model="toy")


def test_deadlines_are_kept(server):
    with pytest.raises(grpc.RpcError) as caught:
        predict(server.grpc, wait_for(3.0), timeout=0.3)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert_alive(server)


def test_too_many_concurrent_requests_are_rejected(server):
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        found = [pool.submit(outcome, server, wait_for(0.5)) for _ in range(20)]
        codes = [future.result() for future in found]
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
    # --max_concurrent_requests also counts calls that have just ended.
    assert codes.count("OK") >= 3
    assert_alive(server)
