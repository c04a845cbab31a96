"""TensorFlow Serving's REST API.

Source: tensorflow_serving/model_servers/http_rest_api_handler.cc and
http_rest_api_util.cc; for the status codes http_server.cc.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import re
import traceback
import urllib.parse
import zlib

import google.protobuf
import grpc
import uvicorn
from google.protobuf import json_format
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from tensorflow_serving.apis import model_pb2
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from export.serving import json_tensor
from export.serving.serving_error import ServingError, invalid, predict_only

# HTTP status by number of the gRPC status; 500 for all others.
_STATUSES = {1: 499, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400}
_STATUSES |= {10: 409, 11: 400, 12: 501, 14: 503, 16: 401}
_MODEL = r"(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
# Case-insensitive except for the call, as in TensorFlow Serving.
_PATHS = {
    "POST": rf"/v1/models/(?P<name>[^/:]+){_MODEL}:"
    "(?P<call>(?-i:predict|classify|regress))",
    "GET": rf"/v1/models(?:/(?P<name>[^/:]+))?{_MODEL}"
    "(?:/(?P<call>(?-i:metadata))|/metadata)?",
}
_BAD_ESCAPE = re.compile("%(?![0-9a-fA-F]{2})")
# Includes fields with their default value; renamed in protobuf 5.
_WITH_DEFAULTS = {
    "including_default_value_fields"
    if google.protobuf.__version__.startswith("4.")
    else "always_print_fields_with_no_presence": True
}
_MAX_HEAD = 2**16  # bytes of a request line and its headers
_OF_BODIES = {b"content-length", b"transfer-encoding"}
_KEEP_ALIVE_SECONDS = 75  # longer than most clients keep idle connections


class RestServer:
    """The REST API on a socket; use it from a single event loop.

    Args:
        models: `models.Models`.
        metrics: `prometheus_metrics.PrometheusMetrics`.
        metrics_paths: list of the paths of the metrics.
        values: the flags of `export.server`.
    """

    def __init__(self, models, metrics, metrics_paths, values):
        """See the class."""
        self._models = models
        self._metrics = metrics
        self._metrics_paths = metrics_paths
        self._max_bytes = values.max_request_bytes
        self._timeout = values.rest_api_timeout_in_ms / 1e3
        self._threads = concurrent.futures.ThreadPoolExecutor(
            values.rest_api_num_threads
        )
        self._server = _UvicornServer(
            uvicorn.Config(
                self._application,
                interface="asgi3",
                loop="asyncio",
                http=_HttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=values.max_concurrent_requests,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            )
        )

    async def serve(self, listener):
        """Serves on a listening socket until `stop`."""
        await self._server.serve(sockets=[listener])

    def stop(self, seconds):
        """Rejects new connections; waits `seconds` for requests in progress.

        `serve` returns after that.
        """
        self._server.config.timeout_graceful_shutdown = seconds
        self._server.should_exit = True

    async def _application(self, scope, receive, send):
        try:
            with self._metrics.request("rest") as record:
                response = await self._respond_in_time(
                    Request(scope, receive), record
                )
        except ClientDisconnect:
            return
        except ServingError as e:
            status = e.http or _STATUSES.get(e.code.value[0], 500)
            response = _json({"error": e.message}, status)
        except Exception:  # a bug; clients do not get the traceback
            traceback.print_exc()
            response = _json({"error": "Internal error."}, 500)
        await response(scope, receive, send)

    async def _respond_in_time(self, request, record):
        try:
            return await asyncio.wait_for(
                self._respond(request, record), self._timeout
            )
        except asyncio.TimeoutError:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            message = f"The request took longer than {self._timeout:g} s."
            raise ServingError(code, message) from None

    async def _respond(self, request, record):
        """Returns the response to a request for any path."""
        body, size = bytearray(), 0
        async for chunk in request.stream():
            # Reads more, because many clients send the whole body before they
            # read the response.
            size += len(chunk)
            if size <= self._max_bytes:
                body += chunk
            elif size > 2 * self._max_bytes:
                break
        if size > self._max_bytes:
            raise self._too_large()
        method, target = request.method, request.scope["target"]
        path, _, query = target.partition("?")
        if path in self._metrics_paths:
            record.method = "metrics"
            if query or method not in ("GET", "POST"):
                raise invalid(f"Unexpected path: {target[:200]}")
            text = self._metrics.text()
            return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})
        if not re.match("/v1/", target, re.IGNORECASE):
            raise ServingError(grpc.StatusCode.NOT_FOUND, "Not found")
        origin = request.headers.get("origin", "")
        if method == "OPTIONS" and re.match("https?://", origin):
            return Response(media_type="application/json")
        zipped = "gzip" in request.headers.get("content-encoding", "")
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self._call, method, target, body, zipped, record
        )

    def _call(self, method, target, body, zipped, record):
        """Returns the response of a model; runs in a thread."""
        match = None
        if method in _PATHS and not _BAD_ESCAPE.search(target):
            match = re.fullmatch(f"(?ai){_PATHS[method]}", target)
        if not match:
            raise invalid(f"Malformed request: {method} {target[:200]}")
        record.method = match["call"] or "status"
        spec = _spec(match)
        record.model = spec.name
        if zipped:
            body = self._unzip(body)
        return getattr(self, f"_{record.method}")(spec, body)

    def _unzip(self, body):
        """Decompresses a body; returns b"" if it is damaged.

        TensorFlow Serving does the same.
        """
        decompressor = zlib.decompressobj(wbits=31)
        try:
            content = decompressor.decompress(body, self._max_bytes)
        except zlib.error:
            return b""
        if not decompressor.eof and len(content) == self._max_bytes:
            raise self._too_large()
        return content if decompressor.eof else b""

    def _too_large(self):
        text = (
            f"Expected a body of at most {self._max_bytes} bytes, received "
            "more; send smaller requests."
        )
        return ServingError(grpc.StatusCode.RESOURCE_EXHAUSTED, text, http=413)

    def _predict(self, spec, body):
        document = json_tensor.load(body)
        with self._models.pinned(spec) as version:
            servable = version.servable
            name, inputs, rows = json_tensor.read_request(
                document, servable.signatures
            )
            outputs = servable.run(name, inputs)
        content = json_tensor.write_response(outputs, rows=rows)
        return Response(content, media_type="application/json")

    def _classify(self, spec, body):
        json_tensor.load(body)
        with self._models.pinned(spec):
            raise predict_only()

    _regress = _classify

    def _metadata(self, spec, body):
        spec, signatures = self._models.signatures(spec)
        metadata = {"signature_def": _message(signatures)}
        return _json({"model_spec": _message(spec), "metadata": metadata})

    def _status(self, spec, body):
        return _json(_message(self._models.statuses(spec)))


class _UvicornServer(uvicorn.Server):
    """Uvicorn's server without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


class _HttpProtocol(HttpToolsProtocol):
    """HTTP protocol with the raw target of requests and a limit for heads."""

    _head = 0  # received bytes of the head or the trailers

    def data_received(self, data):
        self._head += len(data)
        super().data_received(data)
        if self._head > _MAX_HEAD and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self):
        self._head = 0
        names = {name for name, _ in self.headers}
        if self.parser.should_upgrade() and names & _OF_BODIES:
            # The parser would read the body as the next request.
            raise ValueError("A request with Upgrade must not have a body.")
        super().on_headers_complete()
        target = self.url.decode("ascii")
        self.scope["target"] = re.sub("^(?i:https?)://[^/]*", "", target)

    def on_body(self, body):
        self._head = 0
        super().on_body(body)

    def on_message_complete(self):
        self._head = 0
        super().on_message_complete()


def _spec(match):
    """Returns the `ModelSpec` in a path."""
    name = urllib.parse.unquote(match["name"] or "")
    if not name:
        raise invalid("Missing model name in request.")
    spec = model_pb2.ModelSpec(name=name)
    if match["version"]:
        # At most 20 digits: `int` is slow for long texts.
        number = int(match["version"].lstrip("0")[:20] or "0")
        if number >= 2**63:
            raise invalid(f"Failed to convert version: {number} to numeric.")
        spec.version.value = number
    if match["label"]:
        spec.version_label = urllib.parse.unquote(match["label"])
    return spec


def _message(message):
    """Converts a message to JSON values, with the fields' proto names."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, **_WITH_DEFAULTS
    )


def _json(value, status=200):
    content = json.dumps(value, indent=1) + "\n"
    return Response(content, status, media_type="application/json")
