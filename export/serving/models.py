"""The models of a server: which versions are there, which answers."""

import contextlib
import threading
import typing

import grpc
import numpy as np

from clsa_tf.errors import UserError
from export.serving.batching import Batcher
from export.serving.errors import ServingError
from export.serving.settings import check_models
from export.serving.versions import Versions


class Prediction(typing.NamedTuple):
    """What a model answered.

    Attributes:
        version: number of the version that did.
        outputs: arrays by name, rows first.
    """

    version: int
    outputs: typing.Dict[str, np.ndarray]


class Models:
    """Serves models, and follows what appears below their base paths.

    All methods may be called from any thread. `on_event(name, labels, value)`
    is called, from several threads, and must not raise, with

    * `"batch_rows"`, {}: rows of a batch, as it is run;
    * `"queue_seconds"`, {}: how long a request, or a piece, had waited;
    * `"run_seconds"`, {}: how long TensorFlow took for a batch;
    * `"load_seconds"`, {model, version}: for a version that became available;
    * `"load_failures"`, {model, version}: 1 for each attempt that failed;
    * `"version_state"`, {model, version}: the number of a
      `ModelVersionStatus.State`.

    Args:
        configs: list of `ModelConfig`.
        poll_seconds: between looks at the base paths; 0: look once, at the
            start and at `reconfigure`; negative: never.
        retries: attempts to load a version after the first that failed.
        retry_seconds: between them.
        batching: `BatchingParameters`; None: each request runs alone.
        warmup: whether to run a version's warm-up requests before it serves.
        intra_op: threads within an operation; 0: TensorFlow decides. The
            first session of a process decides it for all of them.
        inter_op: operations at the same time; likewise.
        allow_unavailable_labels: whether labels may name versions that are
            not available.
        on_event: function, for metrics.

    Raises:
        UserError: names or paths that cannot be served.
    """

    def __init__(
        self,
        configs,
        *,
        poll_seconds=1.0,
        retries=5,
        retry_seconds=60.0,
        batching=None,
        warmup=True,
        intra_op=0,
        inter_op=0,
        allow_unavailable_labels=False,
        on_event=None,
    ):
        """See the class."""
        check_models(configs)
        on_event = on_event or (lambda name, labels, value: None)
        self._configs = {config.name: config for config in configs}
        self._versions = {}  # by model
        self._settings = {
            "poll_seconds": poll_seconds,
            "retries": retries,
            "retry_seconds": retry_seconds,
            "warmup": warmup,
            "warmup_rows": batching.allowed_batch_sizes if batching else (),
            "intra_op": intra_op,
            "inter_op": inter_op,
            "on_event": on_event,
        }
        self._allow_unavailable_labels = allow_unavailable_labels
        self._changing = threading.Lock()  # one start or `reconfigure` a time
        self._batcher = Batcher(batching, on_event=on_event)

    def start(self):
        """Loads; returns when each version has been tried once.

        Raises:
            UserError: a label of a version that is not available; nothing is
                served then.
        """
        with self._changing:
            self._follow(self._configs)
            try:
                self._check_labels(self._configs.values())
            except UserError:
                self._batcher.stop(0.0)
                self._end(self._versions.values(), 0.0)
                raise

    def stop(self, drain_seconds):
        """Refuses new requests as UNAVAILABLE, finishes those it has, unloads.

        Args:
            drain_seconds: most time for that; what is left then fails.
        """
        with self._changing:
            self._batcher.stop(drain_seconds)
            self._end(self._versions.values(), 1.0)

    def reconfigure(self, configs):
        """Takes over a new list of models; all of it or nothing.

        Models that are gone finish the requests they have; new ones have been
        tried once when it returns, which may take as long as loading them.

        Args:
            configs: list of `ModelConfig`.

        Raises:
            UserError: names or paths that cannot be served, or a label of a
                version that is not available already.
        """
        check_models(configs)
        with self._changing:
            self._check_labels(configs)
            before = self._versions
            self._configs = {config.name: config for config in configs}
            self._follow(self._configs)
            gone = [v for n, v in before.items() if n not in self._configs]
            self._end(gone, None)

    async def predict(
        self,
        name,
        signature,
        inputs,
        *,
        version=None,
        label=None,
        outputs=(),
        timeout=None,
    ):
        """Runs a model.

        Args:
            name: of the model.
            signature: name of one of its; "": `serving_default`.
            inputs: arrays by name, rows first; strings as `bytes` objects.
            version: number of one; None: by label, or the newest.
            label: of a version.
            outputs: names of those wanted; (): all.
            timeout: seconds that the client waits; None: for ever.

        Returns:
            `Prediction`.

        Raises:
            ServingError: with the code that TensorFlow Serving has for it.
        """
        with self._pinned(name, version, label) as (number, servable):
            call = servable.prepare(signature, inputs, outputs)
            found = await self._batcher.run(call, timeout=timeout)
        return Prediction(number, found)

    def statuses(self, name, *, version=None, label=None):
        """Says what state versions are in.

        Args:
            name: of the model.
            version: number of the only one asked for; None: all.
            label: of the only one asked for.

        Returns:
            list of `get_model_status_pb2.ModelVersionStatus`, newest first.

        Raises:
            ServingError: NOT_FOUND, no such model or version.

        Source: tensorflow_serving/model_servers/get_model_status_impl.cc
        """
        number = self._number(name, version, label)
        found = (
            self._versions[name].statuses() if name in self._versions else []
        )
        if number is not None:
            found = [status for status in found if status.version == number]
        if not found:
            wanted = "any versions" if number is None else f"version {number}"
            raise ServingError(
                grpc.StatusCode.NOT_FOUND,
                f"Could not find {wanted} of model {name}",
            )
        return found

    def signatures(self, name, *, version=None, label=None):
        """Says what a version can be asked.

        Returns:
            number of the version, and `SignatureDef`s by name.

        Raises:
            ServingError: as `predict`.
        """
        with self._pinned(name, version, label) as (number, servable):
            return number, dict(servable.signatures)

    @property
    def ready(self):
        """Whether there is an available version of every model."""
        versions = self._versions
        return all(
            name in versions and versions[name].available
            for name in self._configs
        )

    @property
    def queued_rows(self):
        """Rows of requests that wait."""
        return self._batcher.queued_rows

    @contextlib.contextmanager
    def _pinned(self, name, version, label):
        """Keeps the version that answers in memory (`with`)."""
        number = self._number(name, version, label)
        versions = self._versions.get(name)
        found = versions.pin(number) if versions else None
        if not found:
            wanted = f"Latest({name})"
            if number is not None:
                wanted = f"Specific({name}, {number})"
            raise ServingError(
                grpc.StatusCode.NOT_FOUND,
                f"Servable not found for request: {wanted}",
            )
        try:
            yield found.number, found.servable
        finally:
            versions.release(found)

    def _number(self, name, version, label):
        """The version that is asked for; None: the newest.

        Source: tensorflow_serving/model_servers/server_core.cc,
        ServableRequestFromModelSpec.
        """
        if not name:
            raise ServingError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "ModelSpec has no name specified.",
            )
        if version is not None or label is None:
            return version
        config = self._configs.get(name)
        if not config or label not in config.labels:
            raise ServingError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Unrecognized servable version label: {label}",
            )
        return config.labels[label]

    def _follow(self, configs):
        """Starts or changes what follows the models' paths, and waits."""
        changed = {}
        for name, config in configs.items():
            if name in self._versions:
                changed[name] = self._versions[name]
                changed[name].config = config
            else:
                changed[name] = Versions(config, **self._settings)
        self._versions = changed  # at once, for those who do not hold locks
        looks = [(versions, versions.ask()) for versions in changed.values()]
        for versions, look in looks:
            versions.wait(look)

    def _check_labels(self, configs):
        """Raises `UserError` for labels of what is not available.

        Source: tensorflow_serving/model_servers/server_core.cc,
        UpdateModelVersionLabelMap; there, at the start none is.
        """
        if self._allow_unavailable_labels:
            return
        for config in configs:
            versions = self._versions.get(config.name)
            for label, number in config.labels.items():
                if not versions or number not in versions.available:
                    raise UserError(
                        f"Expected the label {label!r} of model "
                        f"{config.name!r} on a version that is available, "
                        f"received {number}; load it first, or pass "
                        "--allow_version_labels_for_unavailable_models."
                    )

    def _end(self, versions, seconds):
        """Ends all of them at the same time, within seconds if given."""
        versions = list(versions)
        for one in versions:
            one.end()
        for one in versions:
            one.join(seconds)
