"""Metrics of the server for Prometheus."""

import contextlib
import time
import types

import grpc
import prometheus_client
from prometheus_client import core

from export.serving.models import STATE
from export.serving.serving_error import ServingError

_LOADS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class PrometheusMetrics:
    """Counters of requests and loads, and the states of all versions.

    Attributes:
        models: `models.Models`; None until they exist.
    """

    def __init__(self):
        """See the class."""
        self.models = None
        self._registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)
        prometheus_client.disable_created_metrics()
        options = {"namespace": "serving", "registry": self._registry}
        labels = ["api", "method", "model"]
        self._requests = prometheus_client.Counter(
            "requests", "Requests by status.", [*labels, "code"], **options
        )
        self._seconds = prometheus_client.Histogram(
            "request_duration_seconds",
            "Seconds from request to response.",
            labels,
            **options,
        )
        self._loads = prometheus_client.Histogram(
            "load_seconds",
            "Seconds to load a version, including its warm-up.",
            buckets=_LOADS,
            **options,
        )
        self._failures = prometheus_client.Counter(
            "load_failures",
            "Failed attempts to load a version.",
            ["model"],
            **options,
        )
        self._registry.register(self)

    @contextlib.contextmanager
    def request(self, api):
        """Counts the body of the `with` statement as a request.

        Yields:
            an object whose `method` and `model` the caller sets.
        """
        record = types.SimpleNamespace(method="other", model="")
        code = grpc.StatusCode.UNKNOWN
        start = time.perf_counter()
        try:
            yield record
            code = grpc.StatusCode.OK
        except ServingError as e:
            code = e.code
            raise
        finally:
            # Unknown names of clients do not get time series of their own.
            known = record.model in dict(self.models.list_versions())
            model = record.model if known else "other"
            labels = (api, record.method, model)
            self._requests.labels(*labels, code.name).inc()
            seconds = time.perf_counter() - start
            self._seconds.labels(*labels).observe(seconds)

    def event(self, kind, model, value):
        """Counts an event of `Models`."""
        if kind == "loaded":
            self._loads.observe(value)
        elif kind == "failed":
            self._failures.labels(model).inc()

    def text(self):
        """Returns all metrics as bytes in Prometheus' format."""
        return prometheus_client.generate_latest(self._registry)

    def collect(self):
        """Yields the states of all versions; the registry calls this."""
        family = core.GaugeMetricFamily(
            "serving_version_state",
            "1 for the current state of each version.",
            labels=["model", "version", "state"],
        )
        models = self.models.list_versions() if self.models else ()
        for name, versions in models:
            for version in versions:
                state = STATE.State.Name(version.state)
                family.add_metric([name, str(version.number), state], 1)
        yield family
