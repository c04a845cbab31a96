"""The process that serves: models, transports, signals, what is printed."""

import asyncio
import contextlib
import functools
import os
import signal
import socket
import sys
import threading

from clsa_tf.errors import UserError
from export.serving import settings
from export.serving.grpc_service import GrpcServer
from export.serving.metrics import Metrics
from export.serving.models import Models
from export.serving.rest import RestServer
from export.serving.servable import open_version

_BACKLOG = 2048  # connections that wait to be accepted
_LOOK_SECONDS = 0.1  # between looks whether all models are loaded


class Server:
    """Models and the transports to them.

    Args:
        configs: list of `ModelConfig`.
        batching: of `settings.read_batching_parameters`, or None.
        metrics_paths: where metrics are served.
        values: the flags of `export.server`.
    """

    def __init__(self, configs, batching, metrics_paths, values):
        """See the class."""
        self._configs = configs
        self._values = values
        self._metrics_paths = metrics_paths
        self._metrics = Metrics()
        self._open_version = functools.partial(
            open_version,
            warm_up=values.enable_model_warmup,
            batching=batching,
            intra_op=values.tensorflow_intra_op_parallelism,
            inter_op=values.tensorflow_inter_op_parallelism,
        )
        self._models = self._grpc = self._rest = self._transport = None
        self._end = asyncio.Event()
        self._printing = threading.Lock()
        self._addresses = None  # until it listens
        self._loaded = []  # pairs of model and version, before that
        self._announced = set()  # models of which a version was

    async def run(self):
        """Loads, then serves until a signal.

        Raises:
            UserError: a port or label cannot be had, or a model not loaded.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._heed, number)
        working = asyncio.create_task(self._work())
        ended = asyncio.create_task(self._end.wait())
        await asyncio.wait(
            [working, ended], return_when=asyncio.FIRST_COMPLETED
        )
        if working.done():
            working.result()  # raises what ended it
        if self._transport:
            await self._drain()

    def _heed(self, number):
        if self._end.is_set():
            os._exit(128 + number)
        self._end.set()

    async def _work(self):
        """Loads, listens, and follows the file of models."""
        values = self._values
        # Before models are loaded, which may take minutes.
        listener = _bind(values.host, values.rest_api_port)
        _bind(values.host, values.port).close()
        self._models = self._metrics.models = Models(
            self._configs,
            self._open_version,
            self._event,
            poll_seconds=values.file_system_poll_wait_seconds,
            retries=values.max_num_load_retries,
            retry_seconds=values.load_retry_interval_micros / 1e6,
            allow_unavailable_labels=(
                values.allow_version_labels_for_unavailable_models
            ),
        )
        await asyncio.to_thread(self._models.wait)
        told = set()
        while waiting := self._models.unavailable():
            for config in self._configs:
                name, path = config.name, config.base_path
                if waiting.get(name) is False:
                    raise UserError(
                        f"Expected a version of model {name!r} that can be "
                        f"served, found none in {path}; export one, or let "
                        "--file_system_poll_wait_seconds look again."
                    )
                if name in waiting.keys() - told:
                    text = f"waiting for a version of {name}, such as {path}/1"
                    _say(f"{text} (Ctrl-C ends)")
                    told.add(name)
            await asyncio.sleep(_LOOK_SECONDS)
        self._listen(listener)
        await asyncio.gather(self._transport, self._follow_file())

    def _listen(self, listener):
        """Opens the ports and says so."""
        values, addresses = self._values, []
        shared = (self._models, self._metrics)
        if values.port:
            self._grpc = GrpcServer(*shared, values)
            address = _address(values.host, max(values.port, 0))
            try:
                port = self._grpc.start(address)
            except RuntimeError as e:
                raise _not_free(address, e) from e
            addresses.append(f"grpc {_address(values.host, port)}")
        self._transport = asyncio.create_task(self._end.wait())
        if values.rest_api_port:
            self._rest = RestServer(*shared, self._metrics_paths, values)
            port = listener.getsockname()[1]
            try:
                listener.listen(_BACKLOG)
            except OSError as e:  # another process was faster
                raise _not_free(_address(values.host, port), e) from e
            addresses.append(f"REST http://{_address(values.host, port)}")
            self._transport = asyncio.create_task(self._rest.serve(listener))
        with self._printing:
            self._addresses = ", ".join(addresses)
            for name, version in self._loaded:
                self._announce(name, version)

    async def _drain(self):
        """Stops, after what is under way has ended or --drain_seconds."""
        self._models.end()
        seconds = self._values.drain_seconds
        if self._rest:
            self._rest.stop(seconds)
        if self._grpc:
            await asyncio.to_thread(self._grpc.stop, seconds)
        await self._transport

    def _event(self, what, name, version, value):
        """Prints and counts what `Models` did; from its thread."""
        self._metrics.event(what, name, value)
        if what == "loaded":
            with self._printing:
                if self._addresses is None:
                    self._loaded.append((name, version))
                else:
                    self._announce(name, version)
        elif what == "failed":
            failed = f"version {version} cannot be loaded: {value.message}"
            _say(f"error: model {name!r}: {failed}")
        elif what == "unloaded":
            _say(f"unloaded version {version} of {name}")
        else:
            _say(f"warning: model {name!r}: {value}")

    def _announce(self, name, version):
        if name in self._announced:
            return _say(f"loaded version {version} of {name}")
        self._announced.add(name)
        text = f"serving {name} version {version}: {self._addresses}"
        _say(text, sys.stdout)

    async def _follow_file(self):
        """Takes over what is written to the file of models."""
        path, said = self._values.model_config_file, None
        while seconds := self._values.model_config_file_poll_wait_seconds:
            await asyncio.sleep(seconds)
            try:
                configs = settings.read_model_configs(path)
                # Also after a change by gRPC: the file wins, as there.
                if configs != self._models.configs:
                    await asyncio.to_thread(self._models.reconfigure, configs)
                    _say(f"took over {path}")
                said = None
            except UserError as e:
                if str(e) != said:
                    _say(f"error: {e} (The models stay as they were.)")
                said = str(e)


def _bind(host, port):
    """A socket; `port` -1: any. Raises `UserError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of sockets that are said to be TCP's, asyncio turns off the delay of
    # small packets, 40 ms for each answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, max(port, 0)))
    except OSError as e:
        listener.close()
        raise _not_free(_address(host, port), e) from e
    return listener


def _not_free(address, error):
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"Expected a free port, could not listen at {address}: {reason}; "
        "choose another --port, --rest_api_port or --host."
    )


def _address(host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _say(text, file=None):
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(text, file=file or sys.stderr, flush=True)
