"""The process that serves: models, transports, signals, what is printed."""

import asyncio
import os
import signal
import socket
import sys
import time

from tensorflow_serving.apis import get_model_status_pb2

from clsa_tf.errors import UserError
from export.serving import settings
from export.serving.admission import Admission
from export.serving.errors import ServingError
from export.serving.grpc_service import GrpcServer
from export.serving.metrics import Metrics
from export.serving.models import Models
from export.serving.rest import RestServer

_STATE = get_model_status_pb2.ModelVersionStatus
_WAS_LOADED = (_STATE.AVAILABLE, _STATE.UNLOADING)
_BACKLOG = 2048  # connections that wait to be accepted
_LOOK_SECONDS = 0.1  # between looks at what versions have become of
_STOP_SECONDS = 5  # to unload what is idle
_SPARE_CONNECTIONS = 256  # for those who look at health and metrics
# Bodies held at a time, in units of the largest one.
HELD_BODIES = 4


class Server:
    """Models, the transports to them and what is said about both.

    Args:
        configs: list of `settings.ModelConfig`.
        batching: `settings.BatchingParameters` or None.
        metrics_paths: where metrics are told.
        values: the flags of `export.server`.
    """

    def __init__(self, configs, batching, metrics_paths, values):
        """See the class."""
        self._configs = configs
        self._values = values
        self._known = {}  # (model, version) -> what was last said of it
        self._end = asyncio.Event()
        self._models = Models(
            configs,
            poll_seconds=values.file_system_poll_wait_seconds,
            retries=values.max_num_load_retries,
            retry_seconds=max(values.load_retry_interval_micros, 0) / 1e6,
            batching=batching,
            warmup=values.enable_model_warmup,
            intra_op=values.tensorflow_intra_op_parallelism,
            inter_op=values.tensorflow_inter_op_parallelism,
            allow_unavailable_labels=(
                values.allow_version_labels_for_unavailable_models
            ),
            on_event=lambda *event: metrics.event(*event),
        )
        metrics = Metrics(
            self._models, lambda: [config.name for config in self._configs]
        )
        most = values.max_concurrent_requests
        bodies = {"max_request_bytes": values.max_request_bytes}
        admission = Admission(most, HELD_BODIES * values.max_request_bytes)
        shared = (self._models, metrics, admission)
        self._grpc = self._rest = None
        if values.port:
            self._grpc = GrpcServer(*shared, max_requests=most, **bodies)
        if values.rest_api_port:
            self._rest = RestServer(
                *shared,
                metrics_paths=metrics_paths,
                max_connections=most + _SPARE_CONNECTIONS,
                timeout_seconds=values.rest_api_timeout_in_ms / 1e3,
                **bodies,
            )

    async def run(self):
        """Serves until a signal.

        Raises:
            UserError: a port or label cannot be had, or there is nothing to
                serve and nothing to wait for.
        """
        self._heed_signals()
        self._addresses, transports = await self._open()
        working = asyncio.create_task(self._work())
        ended = asyncio.create_task(self._end.wait())
        try:
            done, _ = await asyncio.wait(
                [ended, working, *transports],
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done - {ended}:
                task.result()  # raises what ended it
        finally:
            working.cancel()
            ended.cancel()
            await self._close(transports)

    async def _work(self):
        await asyncio.gather(self._watch(), self._load())

    async def _load(self):
        await asyncio.to_thread(self._models.start)
        self._check_models()
        await self._follow_file()

    def _heed_signals(self):
        def end(number):
            if self._end.is_set():
                os._exit(128 + number)
            self._end.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end, number)

    async def _open(self):
        """Listens; returns the addresses and the tasks that serve."""
        host, values = self._values.host, self._values
        addresses, tasks = [], []
        listener = None
        if self._rest:
            listener = _listen(host, values.rest_api_port)
        if self._grpc:
            # By a socket of our own: gRPC prints lines where it fails.
            _listen(host, values.port).close()
            address = _address(host, max(values.port, 0))
            try:
                port = await self._grpc.start(address)
            except OSError as e:
                raise _not_free(address, e) from e
            addresses.append(f"grpc {_address(host, port)}")
        if self._rest:
            port = listener.getsockname()[1]
            addresses.append(f"REST http://{_address(host, port)}")
            tasks.append(asyncio.create_task(self._rest.serve(listener)))
        return ", ".join(addresses), tasks

    async def _close(self, transports):
        """Finishes what is under way, within the seconds there are for it."""
        seconds = self._values.drain_seconds
        end = time.monotonic() + seconds
        if self._rest:
            self._rest.stop(seconds)
        if self._grpc:
            transports = [*transports, self._grpc.stop(seconds)]
        await asyncio.gather(*transports)
        left = max(end - time.monotonic(), 0.0)
        stopping = asyncio.create_task(
            asyncio.to_thread(self._models.stop, left)
        )
        # It waits for a version that is being loaded, we do not.
        await asyncio.wait([stopping], timeout=left + _STOP_SECONDS)

    async def _watch(self):
        """Says what becomes of versions, to people and to health checks."""
        while True:
            if self._grpc:
                await self._grpc.set_serving(self._models.ready)
            for config in self._configs:
                self._tell(config.name)
            await asyncio.sleep(_LOOK_SECONDS)

    def _tell(self, name):
        """Prints what is new of a model; failures, `Models` itself tells."""
        before = self._known.get(name, {})
        now = {status.version: status.state for status in self._states(name)}
        for version, state in sorted(now.items()):
            if state == before.get(version):
                continue
            if (
                state == _STATE.AVAILABLE
                and _STATE.AVAILABLE in before.values()
            ):
                _say(f"loaded version {version} of {name}")
            elif state == _STATE.AVAILABLE:
                text = f"serving {name} version {version}: {self._addresses}"
                print(text, flush=True)
            elif state == _STATE.END and before.get(version) in _WAS_LOADED:
                _say(f"unloaded version {version} of {name}")
        self._known[name] = now

    def _states(self, name):
        try:
            return self._models.statuses(name)
        except ServingError:
            return []  # none so far

    def _check_models(self):
        """Tells of models that nothing is there of, once loading was tried.

        Raises:
            UserError: nothing will come, either.
        """
        for config in self._configs:
            states = {status.state for status in self._states(config.name)}
            if states - {_STATE.END}:
                continue
            if not self._values.file_system_poll_wait_seconds:
                raise UserError(
                    f"Expected a version of model {config.name!r} that can be "
                    f"served, found none in {config.base_path}; export one, or "
                    "let --file_system_poll_wait_seconds look again."
                )
            _say(
                f"waiting for a version of {config.name}, such as "
                f"{config.base_path}/1 (Ctrl-C ends)"
            )

    async def _follow_file(self):
        """Takes over what is written to the file of models."""
        values, said = self._values, None
        seconds = values.model_config_file_poll_wait_seconds
        while seconds:
            await asyncio.sleep(seconds)
            try:
                configs = await asyncio.to_thread(
                    settings.read_model_configs, values.model_config_file
                )
                if configs == self._configs:
                    continue
                await asyncio.to_thread(self._models.reconfigure, configs)
                self._configs, said = configs, None
                _say(f"took over {values.model_config_file}")
            except UserError as e:
                if str(e) != said:
                    _say(f"error: {e} (The models stay as they were.)")
                said = str(e)


def _listen(host, port):
    """A listening socket; `port` -1: any.

    Raises:
        UserError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of sockets that are said to be TCP's, asyncio turns off the delay of
    # small packets, 40 ms for each answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, max(port, 0)))
        listener.listen(_BACKLOG)
    except OSError as e:
        listener.close()
        raise _not_free(_address(host, port), e) from e
    return listener


def _not_free(address, error):
    return UserError(
        f"Expected a free port, could not listen at {address}: "
        f"{error.strerror or error}; choose another --port, --rest_api_port "
        "or --host."
    )


def _address(host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _say(text):
    print(text, file=sys.stderr, flush=True)
