"""Serve exported encoders with TensorFlow Serving's gRPC and REST APIs.

    python -m export.server --model_base_path=models/photos

This is a server in Python for laptops and tests. It has the interfaces, status
codes and flags of TensorFlow Serving, but listens on the loopback interface
only, unless --host is set. export/README.md lists the other differences.

After SIGTERM or SIGINT (Ctrl-C) the server finishes its requests and ends with
exit status 0. A second signal ends it immediately.
"""

import asyncio
import contextlib
import gc
import os
import resource
import sys

import tensorflow as tf
from absl import flags
from tensorflow_serving.config import model_server_config_pb2

from clsa_tf.cli import launch
from clsa_tf.errors import UserError
from clsa_tf.files import newest_savedmodel
from clsa_tf.options.flags import define_path
from export.serving import config_files

try:
    from export.serving.process import EmbeddedServer
except ModuleNotFoundError as e:
    raise SystemExit(
        f"error: Cannot import the packages of the server: {e}; install them "
        "with `pip install 'clsa_tf[serve]'`."
    ) from e

_THREADS = 4 * (os.cpu_count() or 1)
# Name, default, help and minimum: flags of TensorFlow Serving, then our own.
_FLAGS = (
    ("port", 8500, "port of gRPC; 0: no gRPC, -1: any free port", -1),
    ("rest_api_port", 8501, "port of REST; 0: no REST, -1: any free port", -1),
    ("grpc_max_threads", _THREADS, "threads for gRPC requests", 1),
    ("rest_api_num_threads", _THREADS, "threads for REST requests", 1),
    ("rest_api_timeout_in_ms", 30_000, "timeout of a REST request, in ms", 1),
    (
        "enable_grpc_healthcheck_service",
        False,
        "offer the health service grpc.health.v1",
    ),
    ("model_name", "default", "name of the model"),
    ("model_base_path", "", "directory of the model's versions"),
    (
        "model_config_file",
        "",
        "ModelServerConfig in text format, for several models",
    ),
    (
        "model_config_file_poll_wait_seconds",
        0,
        "seconds between polls of --model_config_file; 0: read it once",
        0,
    ),
    (
        "file_system_poll_wait_seconds",
        1,
        "seconds between polls for new versions; 0: look once",
        0,
    ),
    (
        "max_num_load_retries",
        5,
        "further attempts to load a version after a failure",
        0,
    ),
    (
        "load_retry_interval_micros",
        60_000_000,
        "microseconds between attempts to load a version",
        0,
    ),
    (
        "enable_model_warmup",
        True,
        "run the warm-up requests of a version before serving it",
    ),
    (
        "allow_version_labels_for_unavailable_models",
        False,
        "allow new labels for versions that are not available yet. Labels at "
        "the start need it: no version is available then",
    ),
    ("enable_batching", False, "batch the requests of several clients"),
    ("batching_parameters_file", "", "BatchingParameters in text format"),
    (
        "monitoring_config_file",
        "",
        "MonitoringConfig in text format, with a path for metrics in addition "
        "to /metrics",
    ),
    (
        "tensorflow_intra_op_parallelism",
        0,
        "threads within an operation; 0: TensorFlow decides",
        0,
    ),
    (
        "tensorflow_inter_op_parallelism",
        0,
        "operations at the same time; 0: TensorFlow decides",
        0,
    ),
    ("enable_profiler", False, "not supported; has to be false"),
    (
        "host",
        "127.0.0.1",
        "address to listen on; 0.0.0.0: all interfaces. The server has no "
        "authentication and no encryption",
    ),
    ("max_request_bytes", 2**26, "maximum size of a request, in bytes", 1),
    (
        "max_concurrent_requests",
        2048,
        "maximum number of gRPC requests and of REST connections at the same "
        "time; others are rejected",
        1,
    ),
    (
        "drain_seconds",
        30.0,
        "seconds for requests in progress to finish after SIGTERM",
        0,
    ),
)


def read_flags(values):
    """Reads the flags and the files that they name.

    Args:
        values: the flags.

    Returns:
        (list of `ModelConfig`; batching parameters or None; paths of the
        metrics).

    Raises:
        UserError: flags contradict each other, or a file is invalid.
    """
    _check_flags(values)
    if values.model_config_file:
        configs = config_files.read_model_configs(values.model_config_file)
    else:
        path = values.model_base_path
        if "://" not in path:
            path = os.path.abspath(path)
        message = model_server_config_pb2.ModelServerConfig()
        message.model_config_list.config.add(
            name=values.model_name,
            base_path=path,
            model_platform="tensorflow",
        )
        configs = config_files.model_configs(message)
    for config in configs:
        _check_versions(config)
    batching = None
    if values.enable_batching:
        batching = config_files.read_batching_parameters(
            values.batching_parameters_file
        )
    paths = ["/metrics"]
    if values.monitoring_config_file:
        path = config_files.read_monitoring_path(values.monitoring_config_file)
        paths += [path] if path else []
    return configs, batching, paths


def _check_versions(config):
    """Raises `UserError` if a model's path is the path of a single version.

    TensorFlow Serving would wait for versions forever.
    """
    path = os.path.normpath(config.base_path)
    if newest_savedmodel(path) != path:
        return
    parent, number = os.path.split(path)
    if number.isdecimal():
        advice = f"use its parent directory, {parent}"
    else:
        advice = f"move it to {os.path.join(path, '1')} first"
    raise UserError(
        f"Expected a directory of versions for model {config.name!r}, received "
        f"{path}, which is a single version; {advice}."
    )


def _check_flags(values):
    """Raises `UserError` if flags contradict each other."""
    base_path, config_file = values.model_base_path, values.model_config_file
    same_port = values.port == values.rest_api_port != -1
    for wrong, expected, received in (
        (
            base_path and config_file,
            "one of --model_base_path and --model_config_file",
            "both",
        ),
        (
            not base_path and not config_file,
            "--model_base_path or --model_config_file",
            "neither",
        ),
        (
            values.batching_parameters_file and not values.enable_batching,
            "--enable_batching for --batching_parameters_file",
            "--noenable_batching",
        ),
        (
            same_port,
            "different --port and --rest_api_port, at least one not 0",
            f"{values.port} for both",
        ),
        (
            values.enable_profiler,
            "--noenable_profiler, because there is no profiler",
            "--enable_profiler",
        ),
    ):
        if wrong:
            raise UserError(
                f"Expected {expected}, received {received}; correct the flags."
            )


def define_flags(values):
    """Defines this command's flags in `values`."""
    kinds = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for name, default, text, *minimum in _FLAGS:
        define, limits = kinds[type(default)], {}
        if name.endswith(("_path", "_file")):
            define = define_path
        elif minimum:
            maximum = 2**16 - 1 if name.endswith("port") else 2**31 - 1
            limits = {"lower_bound": minimum[0], "upper_bound": maximum}
        define(name, default, text, flag_values=values, **limits)


def main():
    """Reads the flags and serves until a signal."""
    values = flags.FLAGS
    configs, batching, paths = read_flags(values)
    # Hides deprecation warnings about the loader.
    tf.get_logger().setLevel("ERROR")

    # Excludes imported objects from garbage collection, which would delay
    # requests by tenths of a second.
    gc.freeze()
    # By default a request may wait 5 ms for a thread that parses a large one.
    sys.setswitchinterval(0.001)

    # Each connection needs a file descriptor.
    with contextlib.suppress(OSError, ValueError):
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    async def serve():
        status = 0
        try:
            await EmbeddedServer(configs, batching, paths, values).run()
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            status = 1
        sys.stdout.flush()
        # Does not wait for threads that still load or run a model.
        os._exit(status)

    asyncio.run(serve())


if __name__ == "__main__":
    launch.launch(main, define_flags)
