"""TensorFlow Serving's gRPC services.

Source: tensorflow_serving/apis/prediction_service.proto and
model_service.proto; for the responses servables/tensorflow/predict_util.cc,
get_model_metadata_impl.cc and model_servers/model_service_impl.cc.
"""

import concurrent.futures
import time

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

from clsa_tf.errors import UserError
from export.serving.config_files import model_configs
from export.serving.servable import DEFAULT_SIGNATURE
from export.serving.serving_error import ServingError, invalid, predict_only
from export.serving.tensor_proto import from_array, to_array

# Source: tensorflow_serving/model_servers/server.cc, BuildAndStart.
_HEALTHY = ("", "ModelService", "PredictionService")
_FIELD = "signature_def"
_MAX_INPUTS = 1000
_WATCH_SECONDS = 0.2  # for health watchers to read the last status


class GrpcServer:
    """The gRPC services on a port.

    Args:
        models: `models.Models`.
        metrics: `prometheus_metrics.PrometheusMetrics`.
        values: the flags of `export.server`.
    """

    def __init__(self, models, metrics, values):
        """See the class."""
        self._models = models
        self._metrics = metrics
        self._max_bytes = values.max_request_bytes
        self._server = grpc.server(
            concurrent.futures.ThreadPoolExecutor(values.grpc_max_threads),
            maximum_concurrent_rpcs=values.max_concurrent_requests,
            options=[
                ("grpc.max_receive_message_length", self._max_bytes),
                ("grpc.max_send_message_length", -1),
                # Otherwise two servers could silently share a port.
                ("grpc.so_reuseport", 0),
            ],
        )
        # Handlers get bytes, so that invalid messages give INVALID_ARGUMENT.
        self._add(
            "PredictionService",
            Predict=(predict_pb2.PredictRequest, self._predict),
            GetModelMetadata=(
                get_model_metadata_pb2.GetModelMetadataRequest,
                self._metadata,
            ),
            Classify=(
                classification_pb2.ClassificationRequest,
                self._classify,
            ),
            Regress=(regression_pb2.RegressionRequest, self._classify),
            MultiInference=(inference_pb2.MultiInferenceRequest, self._infer),
        )
        self._add(
            "ModelService",
            GetModelStatus=(
                get_model_status_pb2.GetModelStatusRequest,
                lambda request: models.statuses(_spec(request)),
            ),
            HandleReloadConfigRequest=(
                model_management_pb2.ReloadConfigRequest,
                self._reload,
            ),
        )
        self._health = _Health()
        if values.enable_grpc_healthcheck_service:
            health_pb2_grpc.add_HealthServicer_to_server(
                self._health, self._server
            )

    def start(self, address):
        """Listens on `address`, host:port, and returns the port's number.

        Raises:
            RuntimeError: the address is not available.
        """
        port = self._server.add_insecure_port(address)
        self._server.start()
        return port

    def stop(self, seconds):
        """Rejects new calls; waits `seconds` for calls in progress."""
        self._health.end()
        self._server.stop(seconds).wait()

    def _add(self, service, **calls):
        """Adds a service; `calls`: name -> (class of the request, function)."""
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._handler(name, *call),
                response_serializer=lambda reply: reply.SerializeToString(),
            )
            for name, call in calls.items()
        }
        self._server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    f"tensorflow.serving.{service}", handlers
                )
            ]
        )

    def _handler(self, name, kind, call):
        """Returns a handler that converts exceptions into gRPC statuses."""

        def handle(body, context):
            if not context.is_active():  # cancelled while it was queued
                context.abort(grpc.StatusCode.CANCELLED, "cancelled")
            try:
                with self._metrics.request("grpc") as record:
                    record.method = name
                    return call(_parse(kind, body, record))
            except ServingError as e:
                error = e
            context.abort(error.code, error.message[:1024])

        return handle

    def _predict(self, request):
        spec = _spec(request)
        if len(request.inputs) > _MAX_INPUTS:
            raise invalid(
                f"Expected at most {_MAX_INPUTS} inputs, received "
                f"{len(request.inputs)}; send fewer."
            )
        response = predict_pb2.PredictResponse()
        response.model_spec.name = spec.name
        name = spec.signature_name or DEFAULT_SIGNATURE
        response.model_spec.signature_name = name
        with self._models.pinned(spec) as version:
            response.model_spec.version.value = version.number
            inputs, remaining = {}, self._max_bytes
            for key, proto in request.inputs.items():
                inputs[key] = to_array(proto, key, max_bytes=remaining)
                # A small message can request large arrays: limits their sum.
                remaining = max(remaining - inputs[key].nbytes, 0)
            outputs = version.servable.run(name, inputs, request.output_filter)
        for key, array in outputs.items():
            response.outputs[key].CopyFrom(from_array(array))
        return response

    def _classify(self, request):
        with self._models.pinned(_spec(request)):
            raise predict_only()

    def _infer(self, request):
        for task in request.tasks:
            self._classify(task)
        raise invalid("Inference request must have at least one task")

    def _metadata(self, request):
        spec = _spec(request)
        if not request.metadata_field:
            raise invalid("At least one metadata_field must be specified")
        for field in request.metadata_field:
            if field != _FIELD:
                raise invalid(f"Metadata field {field} is not supported")
        spec, signatures = self._models.signatures(spec)
        response = get_model_metadata_pb2.GetModelMetadataResponse(
            model_spec=spec
        )
        response.metadata[_FIELD].Pack(signatures)
        return response

    def _reload(self, request):
        try:
            configs = model_configs(request.config)
        except UserError as e:
            raise invalid(str(e)) from e
        try:
            self._models.reconfigure(configs)
        except UserError as e:
            code = grpc.StatusCode.FAILED_PRECONDITION
            raise ServingError(code, str(e)) from e
        unavailable = self._models.unavailable()
        failed = [name for name, may in unavailable.items() if not may]
        if failed:
            text = f"{len(failed)} model(s) did not become available: {failed}"
            raise ServingError(grpc.StatusCode.UNKNOWN, text)
        return model_management_pb2.ReloadConfigResponse()


class _Health(health.HealthServicer):
    """Health service that ends its watchers when the server stops.

    Otherwise the server would wait for them.
    """

    def __init__(self):
        super().__init__(experimental_non_blocking=True)
        self._watching = set()
        for name in _HEALTHY:
            self.set(name, health_pb2.HealthCheckResponse.SERVING)

    def Watch(self, request, context, send_response_callback=None):
        if context.add_callback(lambda: self._watching.discard(context)):
            self._watching.add(context)
        return super().Watch(request, context, send_response_callback)

    def end(self):
        self.enter_graceful_shutdown()
        if self._watching:
            # The end of a call drops statuses that the client has not read.
            time.sleep(_WATCH_SECONDS)
        for context in list(self._watching):
            context.cancel()


def _parse(kind, body, record):
    try:
        request = kind.FromString(body)
    except DecodeError:
        raise invalid(f"Cannot parse a {kind.__name__}.") from None
    if "model_spec" in kind.DESCRIPTOR.fields_by_name:
        record.model = request.model_spec.name
    return request


def _spec(request):
    if not request.HasField("model_spec"):
        raise invalid("Missing ModelSpec")
    return request.model_spec
