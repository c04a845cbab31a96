"""The server process: models, transports, signals and console output."""

import asyncio
import contextlib
import functools
import os
import signal
import socket
import sys
import threading

from clsa_tf.errors import UserError
from export.serving import config_files
from export.serving.grpc_service import GrpcServer
from export.serving.models import Models
from export.serving.prometheus_metrics import PrometheusMetrics
from export.serving.rest import RestServer
from export.serving.servable import open_version

_BACKLOG = 2048  # pending connections
_POLL_SECONDS = 0.1  # interval of polls for available models


class EmbeddedServer:
    """A server for models, with gRPC and REST.

    Args:
        configs: list of `ModelConfig`.
        batching: result of `config_files.read_batching_parameters`, or None.
        metrics_paths: list of the paths of the metrics.
        values: the flags of `export.server`.
    """

    def __init__(self, configs, batching, metrics_paths, values):
        """See the class."""
        self._configs = configs
        self._values = values
        self._metrics_paths = metrics_paths
        self._metrics = PrometheusMetrics()
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
        self._addresses = None  # text; None until it listens
        self._loaded = []  # pairs of model and version, until it listens
        self._announced = set()  # names of models

    async def run(self):
        """Loads the models and serves until a signal.

        Raises:
            UserError: a port is not available, a label not allowed, or a model
                cannot be loaded.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        working = asyncio.create_task(self._work())
        ended = asyncio.create_task(self._end.wait())
        await asyncio.wait(
            [working, ended], return_when=asyncio.FIRST_COMPLETED
        )
        if working.done():
            working.result()  # raises its exception
        if self._transport:
            await self._drain()

    def _on_signal(self, number):
        if self._end.is_set():
            os._exit(128 + number)
        self._end.set()

    async def _work(self):
        """Loads the models, listens and polls --model_config_file."""
        values = self._values
        # Checks the ports before models are loaded, which may take minutes.
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
        reported = set()
        while unavailable := self._models.unavailable():
            for config in self._configs:
                name, path = config.name, config.base_path
                if unavailable.get(name) is False:
                    raise UserError(
                        f"Cannot serve model {name!r}: {path} has no version "
                        "that can be loaded; export one, or set "
                        "--file_system_poll_wait_seconds to wait for one."
                    )
                if name in unavailable.keys() - reported:
                    text = f"waiting for a version of {name}, such as {path}/1"
                    _print(f"{text} (press Ctrl-C to stop)")
                    reported.add(name)
            await asyncio.sleep(_POLL_SECONDS)
        self._listen(listener)
        await asyncio.gather(self._transport, self._poll_config_file())

    def _listen(self, listener):
        """Opens the ports and announces the loaded models."""
        values, addresses = self._values, []
        shared = (self._models, self._metrics)
        if values.port:
            self._grpc = GrpcServer(*shared, values)
            address = _address(values.host, max(values.port, 0))
            try:
                port = self._grpc.start(address)
            except RuntimeError as e:
                raise _port_error(address, e) from e
            addresses.append(f"grpc {_address(values.host, port)}")
        self._transport = asyncio.create_task(self._end.wait())
        if values.rest_api_port:
            self._rest = RestServer(*shared, self._metrics_paths, values)
            port = listener.getsockname()[1]
            try:
                listener.listen(_BACKLOG)
            except OSError as e:  # taken by another process meanwhile
                raise _port_error(_address(values.host, port), e) from e
            addresses.append(f"REST http://{_address(values.host, port)}")
            self._transport = asyncio.create_task(self._rest.serve(listener))
        with self._printing:
            self._addresses = ", ".join(addresses)
            for name, version in self._loaded:
                self._announce(name, version)

    async def _drain(self):
        """Stops after requests in progress, at most --drain_seconds later."""
        self._models.end()
        seconds = self._values.drain_seconds
        if self._rest:
            self._rest.stop(seconds)
        if self._grpc:
            await asyncio.to_thread(self._grpc.stop, seconds)
        await self._transport

    def _event(self, kind, name, version, value):
        """Prints and counts an event of `Models`, in its thread."""
        self._metrics.event(kind, name, value)
        if kind == "loaded":
            with self._printing:
                if self._addresses is None:
                    self._loaded.append((name, version))
                else:
                    self._announce(name, version)
        elif kind == "failed":
            failed = f"version {version} cannot be loaded: {value.message}"
            _print(f"error: model {name!r}: {failed}")
        elif kind == "unloaded":
            _print(f"unloaded version {version} of {name}")
        else:
            _print(f"warning: model {name!r}: {value}")

    def _announce(self, name, version):
        """Prints a loaded version; its address, too, if it is the first."""
        if name in self._announced:
            return _print(f"loaded version {version} of {name}")
        self._announced.add(name)
        text = f"serving {name} version {version}: {self._addresses}"
        _print(text, sys.stdout)

    async def _poll_config_file(self):
        """Reconfigures the models when --model_config_file changes."""
        path, reported = self._values.model_config_file, None
        while seconds := self._values.model_config_file_poll_wait_seconds:
            await asyncio.sleep(seconds)
            try:
                configs = config_files.read_model_configs(path)
                # The file overrides changes by gRPC, as in TensorFlow Serving.
                if configs != self._models.configs:
                    await asyncio.to_thread(self._models.reconfigure, configs)
                    _print(f"applied {path}")
                reported = None
            except UserError as e:
                if str(e) != reported:
                    _print(f"error: {e} (The models are unchanged.)")
                reported = str(e)


def _bind(host, port):
    """Returns a socket bound to `port`, or to any free port for -1.

    Raises:
        UserError: the port is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm, which delays each response by 40 ms,
    # only for sockets with the protocol TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, max(port, 0)))
    except OSError as e:
        listener.close()
        raise _port_error(_address(host, port), e) from e
    return listener


def _port_error(address, error):
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"Cannot listen on {address}: {reason}; choose another --port, "
        "--rest_api_port or --host."
    )


def _address(host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _print(text, file=None):
    with contextlib.suppress(OSError):  # the reader closed the pipe
        print(text, file=file or sys.stderr, flush=True)
