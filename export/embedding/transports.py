"""Clients of TensorFlow Serving's protocols, gRPC and REST.

Source: tensorflow/serving: apis/*.proto, g3doc/api_rest.md, and
model_servers/http_server.cc for the status codes of REST.
"""

import base64
import re
import ssl
import urllib.parse

import numpy as np

from clsa_tf.errors import first_line
from export.embedding.address import TLS
from export.embedding.rejected import ModelError
from export.messages import reason

_INPUT = "image_bytes"
_SIGNATURES = "signature_def"
_STATUS = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "INVALID_ARGUMENT",  # the request is too large
    429: "RESOURCE_EXHAUSTED",
    502: "UNAVAILABLE",  # from proxies whose server is down
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
# Text in gRPC's errors of TLS handshakes that would fail again.
_HANDSHAKE = re.compile(
    "SSL_ERROR_SSL|CERTIFICATE_VERIFY_FAILED|verification check failed"
    "|security handshaker|not in peer certificate",
    re.IGNORECASE,
)
# Errors of TLS connections that were closed, as while a server restarts.
_CLOSED = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
_CHANNEL = [
    # Responses for thousands of images exceed gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # By default a client may take 2 minutes to reach a restarted server.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


class Grpc:
    """Client of the gRPC protocol.

    Args:
        place: `host:port`, or `grpcs://host:port` for TLS.
        timeout: seconds per call.
        certificates: PEM file of the authorities to trust; "": those that gRPC
            trusts.

    Raises:
        OSError: the file cannot be read or has no certificates.
    """

    def __init__(self, place, *, timeout, certificates=""):
        """See the class."""
        import grpc
        from tensorflow_serving.apis import prediction_service_pb2_grpc

        self.place = place
        self._timeout = timeout
        if place.startswith(TLS):
            trusted = _read_certificates(certificates)
            self._channel = grpc.secure_channel(
                place.removeprefix(TLS),
                grpc.ssl_channel_credentials(trusted),
                _CHANNEL,
            )
        else:
            self._channel = grpc.insecure_channel(place, _CHANNEL)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(
            self._channel
        )

    def predict(self, model, signature, images, outputs):
        """Embeds images.

        Args:
            model: `export.embedding.address.ModelReference`.
            signature: name of the signature.
            images: list of `bytes`.
            outputs: names of the outputs to return; None: all.

        Returns:
            dictionary from output names to arrays.

        Raises:
            ModelError: the call failed.
        """
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2

        request = predict_pb2.PredictRequest(output_filter=outputs or ())
        self._fill(request.model_spec, model)
        request.model_spec.signature_name = signature
        tensor = request.inputs[_INPUT]
        tensor.dtype = tf.string.as_datatype_enum
        tensor.tensor_shape.dim.add().size = len(images)
        tensor.string_val.extend(images)
        response = self._call(self._stub.Predict, request)
        return {
            name: tf.make_ndarray(tensor)
            for name, tensor in response.outputs.items()
        }

    def metadata(self, model):
        """Describes a model, see `Client.metadata`."""
        from google.protobuf import json_format
        from tensorflow_serving.apis import get_model_metadata_pb2 as pb2

        request = pb2.GetModelMetadataRequest(metadata_field=[_SIGNATURES])
        self._fill(request.model_spec, model)
        response = self._call(self._stub.GetModelMetadata, request)
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
        """Describes the versions of a model, see `Client.status`."""
        from google.protobuf import json_format
        from tensorflow_serving.apis import get_model_status_pb2 as pb2
        from tensorflow_serving.apis import model_service_pb2_grpc

        # (`model_service_pb2` of version 2.15.1 is incompatible with protobuf
        # 4.)
        method = model_service_pb2_grpc.ModelServiceStub(
            self._channel
        ).GetModelStatus
        request = pb2.GetModelStatusRequest()
        self._fill(request.model_spec, model)
        status = json_format.MessageToDict(
            self._call(method, request), preserving_proto_field_name=True
        )
        return _states(status.get("model_version_status", []))

    def close(self):
        """Closes the channel."""
        self._channel.close()

    def _fill(self, spec, model):
        spec.name = model.name
        if model.version is not None:
            spec.version.value = model.version
        elif model.label:
            spec.version_label = model.label

    def _call(self, method, request):
        import grpc

        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as e:
            status = shown = e.code().name
            if "larger than max" in (e.details() or ""):
                status = "INVALID_ARGUMENT"  # a retry would fail, too
            message = reason(e.details() or "no details").rstrip(".")
            if status == "UNAVAILABLE" and _HANDSHAKE.search(message):
                cause = message.rpartition("last error: ")[2]
                raise _tls_error(self.place, cause) from e
            raise ModelError(self.place, status, message, shown=shown) from e


class Rest:
    """Client of the REST protocol.

    Args:
        place: URL without `/v1` and all after it.
        timeout: seconds to wait for a response.
        certificates: see `Grpc`; "": those that `requests` trusts.

    Raises:
        OSError: the file cannot be read or has no certificates.
    """

    def __init__(self, place, *, timeout, certificates=""):
        """See the class."""
        import requests

        self.place = place
        self._timeout = timeout
        self._session = requests.Session()
        _read_certificates(certificates)
        # Given with each request: variables of the environment come before
        # those of the session.
        self._verify = certificates or None

    def predict(self, model, signature, images, outputs):
        """Embeds images, see `Grpc.predict`.

        The server always sends all outputs. If a signature has a single
        output, its name in the result is "".
        """
        encoded = [{"b64": base64.b64encode(x).decode()} for x in images]
        response = self._request(
            "POST",
            _path(model) + ":predict",
            {"signature_name": signature, "inputs": {_INPUT: encoded}},
        )
        rows = self._field(response, "outputs")
        rows = rows if isinstance(rows, dict) else {"": rows}
        return {
            name: np.array(x, bool if name == "valid" else np.float32)
            for name, x in rows.items()
            if not outputs or name in outputs or not name
        }

    def metadata(self, model):
        """Describes a model, see `Client.metadata`."""
        response = self._request("GET", _path(model) + "/metadata")
        version = self._field(self._field(response, "model_spec"), "version")
        metadata = self._field(response, "metadata")
        signatures = self._field(metadata, _SIGNATURES)
        return _describe(model, version, signatures)

    def status(self, model):
        """Describes the versions of a model, see `Client.status`."""
        response = self._request("GET", _path(model))
        return _states(self._field(response, "model_version_status"))

    def close(self):
        """Closes the connections."""
        self._session.close()

    def _request(self, verb, path, body=None):
        """Sends a request; returns the JSON of the response."""
        import requests

        try:
            response = self._session.request(
                verb,
                self.place + path,
                json=body,
                timeout=self._timeout,
                verify=self._verify,
            )
            if response.ok:
                return response.json()
        except requests.JSONDecodeError as e:
            raise self._error("INTERNAL", "response is not JSON") from e
        except requests.Timeout as e:
            raise self._error("DEADLINE_EXCEEDED", _root_cause(e)) from e
        except requests.exceptions.SSLError as e:
            if isinstance(_root(e), _CLOSED):
                raise self._error("UNAVAILABLE", _root_cause(e)) from e
            raise _tls_error(self.place, _root_cause(e)) from e
        except requests.ConnectionError as e:
            raise self._error("UNAVAILABLE", _root_cause(e)) from e
        except requests.RequestException as e:
            broken = isinstance(e, requests.exceptions.ChunkedEncodingError)
            status = "UNAVAILABLE" if broken else "UNKNOWN"
            raise self._error(status, _root_cause(e)) from e
        try:
            message = reason(response.json()["error"])
        except (ValueError, LookupError, TypeError, AttributeError):
            message = first_line(response.text.strip() or response.reason)
        raise self._error(
            _STATUS.get(response.status_code, "UNKNOWN"),
            message.rstrip("."),
            shown=f"HTTP {response.status_code}",
        )

    def _field(self, document, name):
        if not isinstance(document, dict) or name not in document:
            raise self._error("INTERNAL", f"response is JSON without {name!r}")
        return document[name]

    def _error(self, status, message, *, shown=None):
        return ModelError(self.place, status, message, shown=shown)


def _read_certificates(path):
    """Returns the contents of a PEM file, or None if there is no path.

    Raises:
        OSError: the file cannot be read or has no certificates.
    """
    if not path:
        return None
    with open(path, "rb") as file:
        content = file.read()
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    return content


def _tls_error(place, received):
    """Returns the `ModelError` for a TLS handshake that would fail again."""
    return ModelError(
        place,
        "UNAUTHENTICATED",
        "expected TLS and a trusted certificate for this address, received "
        f"{received}",
        advice="set --ca_certificates (`certificates` in Python) to the PEM "
        "file of the certificate's authority, or correct the address",
    )


def _root(error):
    """Returns the innermost exception."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _root_cause(error):
    """Returns the message of the innermost exception."""
    return first_line(_root(error))


def _path(model):
    path = f"/v1/models/{urllib.parse.quote(model.name, safe='')}"
    if model.version is not None:
        return f"{path}/versions/{model.version}"
    if model.label:
        return f"{path}/labels/{urllib.parse.quote(model.label, safe='')}"
    return path


def _describe(model, version, signatures):
    """Converts the JSON of a `SignatureDefMap` for `Client.metadata`."""
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
            if not name.startswith("__")  # internal ones of TensorFlow
        },
    }


def _states(statuses):
    """Converts the JSON of `ModelVersionStatus`es for `Client.status`."""
    return [
        {
            "version": int(status.get("version", 0)),
            "state": status.get("state", "UNKNOWN"),
            "error": status.get("status", {}).get("error_message", ""),
        }
        for status in statuses
    ]


def _tensor(info):
    dims = info.get("tensor_shape", {}).get("dim", [])
    return {
        "dtype": info.get("dtype", "DT_INVALID"),
        "shape": [int(dim.get("size", 0)) for dim in dims],
    }
