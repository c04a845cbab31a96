"""What a server counts, for Prometheus."""

import contextlib
import dataclasses
import time

import grpc
import prometheus_client
from google.protobuf import descriptor_pb2, message_factory, text_format
from prometheus_client import core
from tensorflow_serving.apis import get_model_status_pb2

from clsa_tf.errors import UserError
from export.serving.errors import ServingError

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_ROWS = tuple(2**n for n in range(11))
_LOADS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_EVENTS = {
    "queue_seconds": ("How long requests waited for a batch.", _SECONDS),
    "batch_rows": ("Rows of each batch, without padding.", _ROWS),
    "run_seconds": ("How long TensorFlow ran per batch.", _SECONDS),
    "load_seconds": ("How long it took to load and warm up.", _LOADS),
}
_OTHER = "other"  # names that clients made up: no label for each of them
_STATES = get_model_status_pb2.ModelVersionStatus.State
# Source: tensorflow_serving/util/prometheus_exporter.cc, kPrometheusPath.
_DEFAULT_PATH = "/monitoring/prometheus/metrics"


@dataclasses.dataclass
class Record:
    """What is known of a request so far; the transport fills it in."""

    model: str = ""
    signature: str = ""


class Metrics:
    """Counts requests and batches; tells the versions that are there.

    Args:
        models: `models.Models`.
        names: function that returns the names of the models.
    """

    def __init__(self, models, names):
        """See the class."""
        self._models = models
        self._names = names
        self._registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)
        prometheus_client.PlatformCollector(registry=self._registry)
        prometheus_client.disable_created_metrics()
        options = {"namespace": "serving", "registry": self._registry}
        labels = ["api", "method", "model", "signature", "code"]
        self._requests = prometheus_client.Counter(
            "requests",
            "Requests that ended, by the name of their gRPC status.",
            labels,
            **options,
        )
        self._seconds = prometheus_client.Histogram(
            "request_duration_seconds",
            "From the first byte of a request to its answer.",
            labels[:3],
            buckets=_SECONDS,
            **options,
        )
        self._events = {
            name: prometheus_client.Histogram(
                name, text, buckets=buckets, **options
            )
            for name, (text, buckets) in _EVENTS.items()
        }
        self._failures = prometheus_client.Counter(
            "load_failures",
            "Attempts to load a version that failed.",
            ["model"],
            **options,
        )
        self._progress = prometheus_client.Gauge(
            "requests_in_progress", "Requests not answered yet.", **options
        )
        self._registry.register(self)

    @contextlib.contextmanager
    def request(self, api, method):
        """Counts what is done in it (`with`) as one request.

        Args:
            api: "grpc" or "rest".
            method: name of the call.

        Yields:
            `Record`.
        """
        record, code = Record(), grpc.StatusCode.UNKNOWN
        start = time.perf_counter()
        self._progress.inc()
        try:
            yield record
            code = grpc.StatusCode.OK
        except ServingError as e:
            code = e.code
            raise
        finally:
            self._progress.dec()
            seconds = time.perf_counter() - start
            model, signature = self._known(record)
            self._requests.labels(
                api, method, model, signature, code.name
            ).inc()
            self._seconds.labels(api, method, model).observe(seconds)

    def event(self, name, labels, value):
        """Takes note of what `Models` reports by `on_event`."""
        if name in self._events:
            self._events[name].observe(value)
        elif name == "load_failures":
            self._failures.labels(labels["model"]).inc(value)

    def text(self):
        """All of it, bytes in Prometheus' format."""
        return prometheus_client.generate_latest(self._registry)

    def collect(self):
        """For the registry: versions and queue, as they are now."""
        yield core.GaugeMetricFamily(
            "serving_queued_rows",
            "Rows of requests that wait for a batch.",
            value=self._models.queued_rows,
        )
        family = core.GaugeMetricFamily(
            "serving_version_state",
            "1 for the state that each version of a model is in.",
            labels=["model", "version", "state"],
        )
        for name in self._names():
            with contextlib.suppress(ServingError):
                for status in self._models.statuses(name):
                    state = _STATES.Name(status.state)
                    family.add_metric([name, str(status.version), state], 1)
        yield family

    def _known(self, record):
        """The names of a request, as far as they exist."""
        if record.model not in self._names():
            return _OTHER, _OTHER
        signatures = {"": None}
        with contextlib.suppress(ServingError):
            signatures |= self._models.signatures(record.model)[1]
        if record.signature not in signatures:
            return record.model, _OTHER
        return record.model, record.signature


def read_monitoring_path(path):
    """Reads a `monitoring.config`.

    Returns:
        path under which metrics are served; None if it disables them.

    Raises:
        UserError: no such file, not that format, no such path.
    """
    message = _monitoring_message()()
    try:
        with open(path, encoding="utf-8") as file:
            text_format.Parse(file.read(), message)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as e:
        raise UserError(
            "Expected a MonitoringConfig in protobuf's text format, received "
            f"{path}: {' '.join(str(e).split())}; correct the file."
        ) from e
    config = message.prometheus_config
    found = config.path or _DEFAULT_PATH
    if not found.startswith("/") or found.startswith("/v1/"):
        raise UserError(
            "Expected a path that starts with a slash and is not under /v1/, "
            f"received {found!r} in {path}; correct the file."
        )
    return found if config.enable else None


def _monitoring_message():
    """The class of the message, which no Python package contains.

    Source: tensorflow_serving/config/monitoring_config.proto
    """
    field = descriptor_pb2.FieldDescriptorProto
    package = "clsa_tf.monitoring"
    file = descriptor_pb2.FileDescriptorProto(
        name="clsa_tf/monitoring_config.proto", package=package, syntax="proto3"
    )
    config = file.message_type.add(name="PrometheusConfig")
    for number, (name, kind) in enumerate(
        [("enable", field.TYPE_BOOL), ("path", field.TYPE_STRING)], 1
    ):
        config.field.add(
            name=name, number=number, type=kind, label=field.LABEL_OPTIONAL
        )
    file.message_type.add(name="MonitoringConfig").field.add(
        name="prometheus_config",
        number=1,
        type=field.TYPE_MESSAGE,
        type_name=f".{package}.PrometheusConfig",
        label=field.LABEL_OPTIONAL,
    )
    return message_factory.GetMessages([file])[f"{package}.MonitoringConfig"]
