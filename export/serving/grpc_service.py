"""TensorFlow Serving's gRPC services.

Source: tensorflow_serving/apis/prediction_service.proto, model_service.proto,
and for what is answered servables/tensorflow/predict_util.cc,
get_model_metadata_impl.cc and model_servers/get_model_status_impl.cc.
"""

import asyncio

import grpc
import tensorflow as tf
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    predict_pb2,
)

from export.serving import tensor_proto
from export.serving.errors import ServingError

_PREDICTION = "tensorflow.serving.PredictionService"
_MODEL = "tensorflow.serving.ModelService"
# As the health service knows them; the short ones are TensorFlow Serving's.
_SERVICES = ("", _PREDICTION, _MODEL, "PredictionService", "ModelService")
_METADATA = "signature_def"
_DEFAULT_SIGNATURE = tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY
# From here on in bytes, messages are converted beside the event loop.
_LARGE_BYTES = 2**18
_MAX_INPUTS = 1000
# Calls beyond those that work: health and status are told under any load.
_SPARE_CALLS = 256


class GrpcServer:
    """The services on a port; use from one event loop.

    Classify, Regress, MultiInference and reloading the configuration are
    UNIMPLEMENTED.

    Args:
        models: `models.Models`.
        metrics: `metrics.Metrics`.
        admission: `admission.Admission`.
        max_requests: calls at a time beyond which gRPC itself refuses more.
        max_request_bytes: largest message that is received.
    """

    def __init__(
        self, models, metrics, admission, *, max_requests, max_request_bytes
    ):
        """See the class."""
        self._models = models
        self._metrics = metrics
        self._admission = admission
        self._max_bytes = max_request_bytes
        self._health = _Health()
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=max_requests + _SPARE_CALLS,
            options=[
                ("grpc.max_receive_message_length", max_request_bytes),
                ("grpc.max_send_message_length", -1),
                # Or two servers would share the port without a word.
                ("grpc.so_reuseport", 0),
            ],
        )
        calls = {
            _PREDICTION: {
                "Predict": self._predict,
                "GetModelMetadata": self._metadata,
            },
            _MODEL: {"GetModelStatus": self._status},
        }
        self._server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    service,
                    # Without deserializers: bytes in, bytes out.
                    {
                        name: grpc.unary_unary_rpc_method_handler(
                            self._answering(name, call)
                        )
                        for name, call in methods.items()
                    },
                )
                for service, methods in calls.items()
            ]
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self, address):
        """Listens at `address`, host:port; returns the number of the port.

        Raises:
            OSError: it cannot be listened at.
        """
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as e:
            raise OSError(str(e)) from e
        await self._server.start()
        return port

    async def set_serving(self, serving):
        """Tells health checks whether to send requests here."""
        await self._health.set(serving)

    async def stop(self, seconds):
        """Takes no more calls; waits `seconds` for those in progress."""
        await self._health.set(False, over=True)
        await self._server.stop(seconds)

    def _answering(self, name, call):
        """A handler that turns what `call` raises into gRPC's statuses."""

        async def answer(body, context):
            try:
                with self._metrics.request("grpc", name) as record:
                    return await call(body, context, record)
            except ServingError as e:
                await context.abort(e.code, e.message[:1024])

        return answer

    async def _predict(self, body, context, record):
        with self._admission.request() as receive:
            receive(len(body))
            large = len(body) > _LARGE_BYTES
            request, inputs = await _beside(large, self._read_predict, body)
            name, choice = _chosen(request)
            signature = request.model_spec.signature_name or _DEFAULT_SIGNATURE
            record.model, record.signature = name, signature
            prediction = await self._models.predict(
                name,
                signature,
                inputs,
                outputs=tuple(request.output_filter),
                timeout=context.time_remaining(),
                **choice,
            )
            size = sum(array.nbytes for array in prediction.outputs.values())
            return await _beside(
                size > _LARGE_BYTES, _write_predict, name, signature, prediction
            )

    def _read_predict(self, body):
        request = _read(predict_pb2.PredictRequest, body)
        if len(request.inputs) > _MAX_INPUTS:
            raise _invalid(f"There are {len(request.inputs)} inputs.")
        inputs, left = {}, self._max_bytes
        for name, proto in request.inputs.items():
            array = tensor_proto.to_array(proto, name, max_bytes=left)
            # Small messages can ask for large arrays, many of them for more.
            left = max(left - array.nbytes, 0)
            inputs[name] = array
        return request, inputs

    async def _metadata(self, body, context, record):
        del context
        request = _read(get_model_metadata_pb2.GetModelMetadataRequest, body)
        record.model, choice = _chosen(request)
        if not request.metadata_field:
            raise _invalid(
                "GetModelMetadataRequest must specify at least one "
                "metadata_field"
            )
        for field in request.metadata_field:
            if field != _METADATA:
                raise _invalid(f"Metadata field {field} is not supported")
        return metadata(
            self._models, record.model, **choice
        ).SerializeToString()

    async def _status(self, body, context, record):
        del context
        request = _read(get_model_status_pb2.GetModelStatusRequest, body)
        record.model, choice = _chosen(request)
        return status(self._models, record.model, **choice).SerializeToString()


def metadata(models, name, *, version=None, label=None):
    """What signatures a model has.

    Returns:
        `GetModelMetadataResponse`.

    Raises:
        ServingError: as `Models.signatures`.
    """
    number, signatures = models.signatures(name, version=version, label=label)
    response = get_model_metadata_pb2.GetModelMetadataResponse()
    response.model_spec.name = name
    response.model_spec.version.value = number
    found = get_model_metadata_pb2.SignatureDefMap()
    for key, signature in signatures.items():
        found.signature_def[key].CopyFrom(signature)
    response.metadata[_METADATA].Pack(found)
    return response


def status(models, name, *, version=None, label=None):
    """Which versions of a model are there.

    Returns:
        `GetModelStatusResponse`.

    Raises:
        ServingError: as `Models.statuses`.
    """
    found = models.statuses(name, version=version, label=label)
    for one in found:
        one.status.SetInParent()  # OK is said, too
    return get_model_status_pb2.GetModelStatusResponse(
        model_version_status=found
    )


class _Health(health_pb2_grpc.HealthServicer):
    """One status for all services; ends those who watch it when it is over.

    (The library's own lets them keep a server from stopping.)
    """

    def __init__(self):
        self._serving = self._over = False
        self._changed = asyncio.Condition()

    async def set(self, serving, over=False):
        async with self._changed:
            self._over = self._over or over
            self._serving = serving and not self._over
            self._changed.notify_all()

    async def Check(self, request, context):
        if request.service not in _SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return self._response(request)

    async def Watch(self, request, context):
        told, over = None, False
        while not over:
            async with self._changed:
                while not self._over and told == self._response(request):
                    await self._changed.wait()
                told, over = self._response(request), self._over
            await context.write(told)

    def _response(self, request):
        status = health_pb2.HealthCheckResponse
        if request.service not in _SERVICES:
            return status(status=status.SERVICE_UNKNOWN)
        known = status.SERVING if self._serving else status.NOT_SERVING
        return status(status=known)


def _invalid(message):
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)


async def _beside(large, function, *arguments):
    """Calls a function, in a thread where that takes long."""
    if large:
        return await asyncio.to_thread(function, *arguments)
    return function(*arguments)


def _read(kind, body):
    try:
        return kind.FromString(body)
    except DecodeError:
        raise _invalid(f"The message is no {kind.__name__}.") from None


def _chosen(request):
    """Name of the model that a request is for, and which version of it."""
    if not request.HasField("model_spec"):
        raise _invalid("Missing ModelSpec")
    spec = request.model_spec
    if not spec.name:
        raise _invalid("ModelSpec has no name specified.")
    choice = spec.WhichOneof("version_choice")
    if choice == "version":
        return spec.name, {"version": spec.version.value}
    if choice == "version_label":
        return spec.name, {"label": spec.version_label}
    return spec.name, {}


def _write_predict(name, signature, prediction):
    response = predict_pb2.PredictResponse()
    response.model_spec.name = name
    response.model_spec.signature_name = signature
    response.model_spec.version.value = prediction.version
    for key, array in prediction.outputs.items():
        response.outputs[key].CopyFrom(tensor_proto.from_array(array))
    return response.SerializeToString()
