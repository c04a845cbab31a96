"""The two protocols of TensorFlow Serving, from the side of a client.

Source: tensorflow/serving: apis/*.proto, g3doc/api_rest.md, and for the status
codes of REST model_servers/http_server.cc.
"""

import base64
import urllib.parse

import numpy as np

from clsa_tf.errors import first_line
from export.embedding.refusal import ModelError
from export.messages import reason

_INPUT = "image_bytes"
_SIGNATURES = "signature_def"
_STATUS = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "INVALID_ARGUMENT",  # the request is too large
    429: "RESOURCE_EXHAUSTED",
    502: "UNAVAILABLE",  # said by proxies before servers that are down
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_CHANNEL = [
    # Thousands of images give more than gRPC's 4 MiB.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Otherwise a server that is back would not be found for up to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


class Grpc:
    """Calls by gRPC.

    Args:
        place: `host:port`.
        timeout: seconds for a call.
    """

    def __init__(self, place, *, timeout):
        """See the class."""
        import grpc
        from tensorflow_serving.apis import prediction_service_pb2_grpc

        self.place = place
        self._timeout = timeout
        self._channel = grpc.insecure_channel(place, _CHANNEL)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(
            self._channel
        )

    def predict(self, model, signature, images, outputs):
        """Embeds images.

        Args:
            model: `export.client.Model`.
            signature: name.
            images: list of `bytes`.
            outputs: names of those wanted; None: all.

        Returns:
            dictionary from names to arrays.

        Raises:
            ModelError: the call failed.
        """
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2

        request = predict_pb2.PredictRequest(output_filter=outputs or ())
        self._choose(request.model_spec, model)
        request.model_spec.signature_name = signature
        tensor = request.inputs[_INPUT]
        tensor.dtype = tf.string.as_datatype_enum
        tensor.tensor_shape.dim.add().size = len(images)
        tensor.string_val.extend(images)
        response = self._answer(self._stub.Predict, request)
        return {
            name: tf.make_ndarray(tensor)
            for name, tensor in response.outputs.items()
        }

    def metadata(self, model):
        """Describes a model; see `Client.metadata`."""
        from google.protobuf import json_format
        from tensorflow_serving.apis import get_model_metadata_pb2 as pb2

        request = pb2.GetModelMetadataRequest(metadata_field=[_SIGNATURES])
        self._choose(request.model_spec, model)
        response = self._answer(self._stub.GetModelMetadata, request)
        signatures = pb2.SignatureDefMap()
        response.metadata[_SIGNATURES].Unpack(signatures)
        return _describe(
            model,
            response.model_spec.version.value,
            json_format.MessageToDict(
                signatures, preserving_proto_field_name=True
            ),
        )

    def status(self, model):
        """Describes the versions of a model; see `Client.status`."""
        from google.protobuf import json_format
        from tensorflow_serving.apis import get_model_status_pb2 as pb2
        from tensorflow_serving.apis import model_service_pb2_grpc

        # (`model_service_pb2`, its neighbour of 2.15.1, cannot be imported
        # beside protobuf 4.)
        method = model_service_pb2_grpc.ModelServiceStub(
            self._channel
        ).GetModelStatus
        request = pb2.GetModelStatusRequest()
        self._choose(request.model_spec, model)
        found = json_format.MessageToDict(
            self._answer(method, request), preserving_proto_field_name=True
        )
        return _states(found.get("model_version_status", []))

    def close(self):
        """Closes the channel."""
        self._channel.close()

    def _choose(self, spec, model):
        spec.name = model.name
        if model.version is not None:
            spec.version.value = model.version
        elif model.label:
            spec.version_label = model.label

    def _answer(self, method, request):
        import grpc

        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as e:
            status = shown = e.code().name
            if "larger than max" in (e.details() or ""):
                status = "INVALID_ARGUMENT"  # it will be the next time, too
            said = reason(e.details() or "without a word").rstrip(".")
            raise ModelError(self.place, status, said, shown=shown) from e


class Rest:
    """Calls by REST.

    Args:
        place: URL up to `/v1`.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, place, *, timeout):
        """See the class."""
        import requests

        self.place = place
        self._timeout = timeout
        self._session = requests.Session()

    def predict(self, model, signature, images, outputs):
        """Embeds images; as `Grpc.predict`.

        All outputs come, whatever was wanted; the only output of a signature
        has the name "".
        """
        encoded = [{"b64": base64.b64encode(x).decode()} for x in images]
        answer = self._answer(
            "POST",
            _path(model) + ":predict",
            {"signature_name": signature, "inputs": {_INPUT: encoded}},
        )
        rows = self._field(answer, "outputs")
        rows = rows if isinstance(rows, dict) else {"": rows}
        return {
            name: np.array(x, bool if name == "valid" else np.float32)
            for name, x in rows.items()
            if not outputs or name in outputs or not name
        }

    def metadata(self, model):
        """Describes a model; see `Client.metadata`."""
        answer = self._answer("GET", _path(model) + "/metadata")
        version = self._field(self._field(answer, "model_spec"), "version")
        found = self._field(self._field(answer, "metadata"), _SIGNATURES)
        return _describe(model, version, found)

    def status(self, model):
        """Describes the versions of a model; see `Client.status`."""
        answer = self._answer("GET", _path(model))
        return _states(self._field(answer, "model_version_status"))

    def close(self):
        """Closes the connections."""
        self._session.close()

    def _answer(self, verb, path, body=None):
        import requests

        try:
            answer = self._session.request(
                verb, self.place + path, json=body, timeout=self._timeout
            )
            if answer.ok:
                return answer.json()
        except requests.JSONDecodeError as e:
            raise self._error("INTERNAL", "no JSON") from e
        except requests.Timeout as e:
            raise self._error("DEADLINE_EXCEEDED", _root(e)) from e
        except requests.ConnectionError as e:
            raise self._error("UNAVAILABLE", _root(e)) from e
        except requests.RequestException as e:
            broken = isinstance(e, requests.exceptions.ChunkedEncodingError)
            status = "UNAVAILABLE" if broken else "UNKNOWN"
            raise self._error(status, _root(e)) from e
        try:
            said = reason(answer.json()["error"])
        except (ValueError, LookupError, TypeError, AttributeError):
            said = first_line(answer.text.strip() or answer.reason)
        raise self._error(
            _STATUS.get(answer.status_code, "UNKNOWN"),
            said.rstrip("."),
            shown=f"HTTP {answer.status_code}",
        )

    def _field(self, answer, name):
        if not isinstance(answer, dict) or name not in answer:
            raise self._error("INTERNAL", f"JSON without {name!r}")
        return answer[name]

    def _error(self, status, said, *, shown=None):
        return ModelError(self.place, status, said, shown=shown)


def _root(error):
    """What happened, without the objects of libraries around it."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)


def _path(model):
    path = f"/v1/models/{urllib.parse.quote(model.name, safe='')}"
    if model.version is not None:
        return f"{path}/versions/{model.version}"
    if model.label:
        return f"{path}/labels/{urllib.parse.quote(model.label, safe='')}"
    return path


def _describe(model, version, signatures):
    """What `Client.metadata` returns, of the JSON of a `SignatureDefMap`."""
    return {
        "model": model.name,
        "version": int(version),
        "signatures": {
            name: {
                side: {
                    key: _tensor(info)
                    for key, info in sorted(signature.get(side, {}).items())
                }
                for side in ("inputs", "outputs")
            }
            for name, signature in sorted(signatures[_SIGNATURES].items())
            if not name.startswith("__")  # TensorFlow's own
        },
    }


def _states(found):
    """What `Client.status` returns, of the JSON of `ModelVersionStatus`."""
    return [
        {
            "version": int(one.get("version", 0)),
            "state": one.get("state", "UNKNOWN"),
            "error": one.get("status", {}).get("error_message", ""),
        }
        for one in found
    ]


def _tensor(info):
    dims = info.get("tensor_shape", {}).get("dim", [])
    return {
        "dtype": info.get("dtype", "DT_INVALID"),
        "shape": [int(dim.get("size", 0)) for dim in dims],
    }
