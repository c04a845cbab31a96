"""TensorFlow Serving's REST API.

Source: tensorflow_serving/model_servers/http_rest_api_handler.cc, and
http_server.cc for the statuses.
"""

import asyncio
import contextlib
import json
import time
import traceback

import google.protobuf
import grpc
import uvicorn
from google.protobuf import json_format
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from tensorflow_serving.apis import get_model_metadata_pb2

from export.serving import grpc_service, json_outputs, json_tensor
from export.serving import metrics as metrics_lib
from export.serving.errors import ServingError
from export.serving.http_request import (
    CLOSE,
    Refused,
    read_address,
    read_body,
)

_Code = grpc.StatusCode
# The others are 500.
_STATUSES = {
    _Code.CANCELLED: 499,
    _Code.INVALID_ARGUMENT: 400,
    _Code.DEADLINE_EXCEEDED: 504,
    _Code.NOT_FOUND: 404,
    _Code.ALREADY_EXISTS: 409,
    _Code.PERMISSION_DENIED: 403,
    _Code.RESOURCE_EXHAUSTED: 429,
    _Code.FAILED_PRECONDITION: 400,
    _Code.ABORTED: 409,
    _Code.OUT_OF_RANGE: 400,
    _Code.UNIMPLEMENTED: 501,
    _Code.UNAVAILABLE: 503,
    _Code.UNAUTHENTICATED: 401,
}
# Asks for fields that have their default value; renamed in protobuf 5.
_WITH_DEFAULTS = {
    "including_default_value_fields"
    if google.protobuf.__version__.startswith("4.")
    else "always_print_fields_with_no_presence": True
}
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_KEEP_ALIVE_SECONDS = 75  # of idle connections; most clients give up earlier


class RestServer:
    """The API on a socket; use from one event loop.

    Args:
        models: `models.Models`.
        metrics: `metrics.Metrics`.
        admission: `admission.Admission`.
        metrics_paths: where metrics are told.
        max_connections: open at a time; more are answered 503.
        max_request_bytes: largest body that is taken; larger ones are 413.
        timeout_seconds: from a request's first byte to its answer.
    """

    def __init__(
        self,
        models,
        metrics,
        admission,
        *,
        metrics_paths,
        max_connections,
        max_request_bytes,
        timeout_seconds,
    ):
        """See the class."""
        self._models = models
        self._metrics = metrics
        self._admission = admission
        self._max_bytes = max_request_bytes
        self._timeout = timeout_seconds
        self._many = asyncio.Semaphore(1)
        application = Starlette(
            routes=[
                *(Route(path, self._tell_metrics) for path in metrics_paths),
                Route("/healthz", self._tell_health),
                *(
                    Route(f"/{v}/{{path:path}}", self._answer, methods=_METHODS)
                    for v in ("v1", "V1")  # TensorFlow Serving takes both
                ),
            ],
            exception_handlers={HTTPException: _refuse},
        )
        application.router.redirect_slashes = False
        self._server = _Server(
            uvicorn.Config(
                application,
                loop="asyncio",
                # httptools takes headers of any length.
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=max_connections,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            )
        )

    async def serve(self, listener):
        """Serves a listening socket until `stop`."""
        await self._server.serve(sockets=[listener])

    def stop(self, seconds):
        """Lets `serve` return, after at most `seconds` for what is under way.

        No connection is accepted from now on.
        """
        self._server.config.timeout_graceful_shutdown = seconds
        self._server.should_exit = True

    async def _tell_metrics(self, request):
        del request
        return Response(
            self._metrics.text(), media_type=metrics_lib.CONTENT_TYPE
        )

    async def _tell_health(self, request):
        """200 when requests can be sent, for load balancers."""
        del request
        if self._models.ready and not self._server.should_exit:
            return PlainTextResponse("ready\n")
        return PlainTextResponse("not ready\n", status_code=503)

    async def _answer(self, request):
        """Answers anything about models, failures included."""
        try:
            path = request.scope["raw_path"].decode()
            address = read_address(request.method, path)
            with self._metrics.request("rest", address.method) as record:
                record.model = address.name
                return await self._call(request, address, record)
        except Refused as e:
            return _error(e.status, e.message, e.headers)
        except ServingError as e:
            return _error(_STATUSES.get(e.code, 500), e.message)
        except ClientDisconnect:
            return _error(499, "The client is gone.")  # told to nobody
        except Exception:  # ours; the traceback is for us
            traceback.print_exc()
            return _error(500, "Internal error.")

    async def _call(self, request, address, record):
        """Does what an address says; returns the response."""
        method, name, choice = address
        if not name:
            raise _invalid("Missing model name in request.")
        if method == "predict":
            return await self._predict(request, choice, record)
        if method == "metadata":
            found = grpc_service.metadata(self._models, name, **choice)
            return _json(_metadata(found))
        if method == "status":
            found = grpc_service.status(self._models, name, **choice)
            return _json(_message(found))
        raise ServingError(
            _Code.UNIMPLEMENTED, f"This server has no {method}; use predict."
        )

    async def _predict(self, request, choice, record):
        end = time.monotonic() + self._timeout
        with self._admission.request() as receive:
            _, signatures = self._models.signatures(record.model, **choice)
            try:
                body = await asyncio.wait_for(
                    read_body(request, receive, max_bytes=self._max_bytes),
                    self._timeout,
                )
            except asyncio.TimeoutError:
                raise Refused(
                    408, "The body did not come in time.", CLOSE
                ) from None
            parsed = await self._beside(
                len(body), json_tensor.read_request, body, signatures
            )
            record.signature = parsed.signature
            prediction = await self._models.predict(
                record.model,
                parsed.signature,
                parsed.inputs,
                timeout=max(end - time.monotonic(), 0.0),
                **choice,
            )
            outputs = prediction.outputs
            # A number is some 12 characters in JSON.
            size = 12 * sum(array.size for array in outputs.values())
            content = await self._beside(size, _write, outputs, parsed.rows)
            return Response(content, media_type="application/json")

    async def _beside(self, size, function, *arguments):
        """Calls a function; in a thread, one at a time, where it takes long.

        Nested lists can take twenty times the memory of their text.
        """
        if size <= json_tensor.LARGE_BYTES:
            return function(*arguments)
        async with self._many:
            return await asyncio.to_thread(function, *arguments)


class _Server(uvicorn.Server):
    """Leaves the signals of the process alone."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def _invalid(message):
    return ServingError(_Code.INVALID_ARGUMENT, message)


def _write(outputs, rows):
    return json_outputs.write_response(outputs, rows=rows)


def _message(message):
    """A message as JSON in Python's types, fields by their proto names."""
    return json_format.MessageToDict(
        message,
        preserving_proto_field_name=True,
        **_WITH_DEFAULTS,
    )


def _metadata(response):
    signatures = get_model_metadata_pb2.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    return {
        "model_spec": _message(response.model_spec),
        "metadata": {"signature_def": _message(signatures)},
    }


def _json(value, status=200, headers=None):
    content = json.dumps(value, indent=1) + "\n"
    return Response(content, status, headers, "application/json")


def _error(status, message, headers=None):
    return _json({"error": message}, status, headers)


async def _refuse(request, error):
    del request
    return _error(error.status_code, error.detail, error.headers)
