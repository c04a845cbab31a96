"""What a server counts, for Prometheus."""

import contextlib
import time
import types

import grpc
import prometheus_client
from prometheus_client import core

from export.serving.errors import ServingError
from export.serving.models import STATE

_LOADS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """Counts requests and loads; reports the versions that are there.

    Attributes:
        models: `models.Models`, once they are there.
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
            "Until the answer.",
            labels,
            **options,
        )
        self._loads = prometheus_client.Histogram(
            "load_seconds",
            "With warm-up.",
            buckets=_LOADS,
            **options,
        )
        self._failures = prometheus_client.Counter(
            "load_failures", "Failed attempts.", ["model"], **options
        )
        self._registry.register(self)

    @contextlib.contextmanager
    def request(self, api):
        """Counts what is done in it (`with`) as a request.

        Yields an object whose `method` and `model` are to be set.
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
            # No series for every name that a client makes up.
            known = record.model in dict(self.models.list_versions())
            model = record.model if known else "other"
            labels = (api, record.method, model)
            self._requests.labels(*labels, code.name).inc()
            seconds = time.perf_counter() - start
            self._seconds.labels(*labels).observe(seconds)

    def event(self, what, model, value):
        """Counts an event of `Models`."""
        if what == "loaded":
            self._loads.observe(value)
        elif what == "failed":
            self._failures.labels(model).inc()

    def text(self):
        """All of it, bytes in Prometheus' format."""
        return prometheus_client.generate_latest(self._registry)

    def collect(self):
        """For the registry: versions, as they are now."""
        family = core.GaugeMetricFamily(
            "serving_version_state",
            "1 for the state that each version of a model is in.",
            labels=["model", "version", "state"],
        )
        models = self.models.list_versions() if self.models else ()
        for name, versions in models:
            for version in versions:
                state = STATE.State.Name(version.state)
                family.add_metric([name, str(version.number), state], 1)
        yield family
