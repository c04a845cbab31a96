"""Serves exported encoders over gRPC and REST, as TensorFlow Serving does.

    python -m export.server --model_base_path=models/photos

A server in Python for laptops and tests, with TensorFlow Serving's interfaces,
statuses and flags. Unlike there, it listens on the loopback interface only
unless --host says otherwise. The other differences: export/README.md.

SIGTERM and SIGINT (Ctrl-C) let it finish what it has and end, with exit status
0; the second one ends it at once.
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
from export.serving import settings

try:
    from export.serving.process import Server
except ModuleNotFoundError as e:
    raise SystemExit(
        f"error: Expected the packages of the server, received: {e}; install "
        "them: pip install 'clsa_tf[serve]'."
    ) from e

_THREADS = 4 * (os.cpu_count() or 1)
# Name, default, help and least value: first TensorFlow Serving's, then ours.
_FLAGS = (
    ("port", 8500, "port of gRPC; 0: none, -1: any free one", -1),
    ("rest_api_port", 8501, "port of REST; 0: none, -1: any free one", -1),
    ("grpc_max_threads", _THREADS, "gRPC requests worked on at a time", 1),
    ("rest_api_num_threads", _THREADS, "REST requests worked on at a time", 1),
    ("rest_api_timeout_in_ms", 30_000, "milliseconds for a REST request", 1),
    ("enable_grpc_healthcheck_service", False, "answer grpc.health.v1"),
    ("model_name", "default", "name of the one model"),
    ("model_base_path", "", "directory of the one model's versions"),
    ("model_config_file", "", "ModelServerConfig: the models instead of one"),
    (
        "model_config_file_poll_wait_seconds",
        0,
        "seconds between looks at --model_config_file; 0: only at the start",
        0,
    ),
    (
        "file_system_poll_wait_seconds",
        1,
        "seconds between looks for new versions; 0: only at the start",
        0,
    ),
    (
        "max_num_load_retries",
        5,
        "attempts to load a version after the first that failed",
        0,
    ),
    (
        "load_retry_interval_micros",
        60_000_000,
        "microseconds between attempts to load a version",
        0,
    ),
    ("enable_model_warmup", True, "run a version's warm-up requests first"),
    (
        "allow_version_labels_for_unavailable_models",
        False,
        "let new labels name versions that are not available (yet), which no "
        "version is at the start",
    ),
    ("enable_batching", False, "run requests of several clients together"),
    ("batching_parameters_file", "", "BatchingParameters in text format"),
    (
        "monitoring_config_file",
        "",
        "MonitoringConfig in text format: where to serve metrics besides "
        "/metrics",
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
        "operations at a time; 0: TensorFlow decides",
        0,
    ),
    ("enable_profiler", False, "not offered: only false is taken"),
    (
        "host",
        "127.0.0.1",
        "address to listen at; 0.0.0.0 for everyone who can reach this "
        "machine: there is neither a password nor encryption",
    ),
    ("max_request_bytes", 2**26, "bytes of the largest request", 1),
    (
        "max_concurrent_requests",
        2048,
        "gRPC requests, and connections of REST, at a time; more are refused",
        1,
    ),
    (
        "drain_seconds",
        30.0,
        "seconds that requests in progress have to finish after SIGTERM",
        0,
    ),
)


def read_flags(values):
    """Makes settings of the flags, and reads the files they name.

    Args:
        values: the flags.

    Returns:
        list of `ModelConfig`; parameters of batching, None without it; paths
        where metrics are served.

    Raises:
        UserError: flags that contradict each other, or a file that is wrong.
    """
    _check_flags(values)
    if values.model_config_file:
        configs = settings.read_model_configs(values.model_config_file)
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
        configs = settings.model_configs(message)
    for config in configs:
        _check_versions(config)
    batching = None
    if values.enable_batching:
        batching = settings.read_batching_parameters(
            values.batching_parameters_file
        )
    paths = ["/metrics"]
    if values.monitoring_config_file:
        path = settings.read_monitoring_path(values.monitoring_config_file)
        paths += [path] if path else []
    return configs, batching, paths


def _check_versions(config):
    """Raises `UserError` if a model's path is that of a single version.

    TensorFlow Serving would wait there for versions that never come.
    """
    path = os.path.normpath(config.base_path)
    if newest_savedmodel(path) != path:
        return
    parent, number = os.path.split(path)
    if number.isdecimal():
        advice = f"name the directory that it is in, {parent}"
    else:
        advice = f"move it to {os.path.join(path, '1')} first"
    raise UserError(
        f"Expected the directory of the versions of model {config.name!r}, "
        f"received {path}, which is one version; {advice}."
    )


def _check_flags(values):
    """Raises `UserError` if flags contradict each other."""
    one, several = values.model_base_path, values.model_config_file
    same = values.port == values.rest_api_port != -1
    for wrong, expected, received in (
        (
            one and several,
            "one of --model_base_path and --model_config_file",
            "both",
        ),
        (
            not one and not several,
            "--model_base_path or --model_config_file",
            "neither",
        ),
        (
            values.batching_parameters_file and not values.enable_batching,
            "--enable_batching for --batching_parameters_file",
            "--noenable_batching",
        ),
        (same, "different ports, one of them not 0", f"{values.port} twice"),
        (values.enable_profiler, "--noenable_profiler, there is none", "it"),
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
    for name, default, text, *least in _FLAGS:
        define, limits = kinds[type(default)], {}
        if name.endswith(("_path", "_file")):
            define = define_path
        elif least:
            most = 2**16 - 1 if name.endswith("port") else 2**31 - 1
            limits = {"lower_bound": least[0], "upper_bound": most}
        define(name, default, text, flag_values=values, **limits)


def main():
    """Reads the flags and serves until a signal."""
    values = flags.FLAGS
    configs, batching, paths = read_flags(values)
    # What it thinks of its own loader is not for who runs a server.
    tf.get_logger().setLevel("ERROR")

    # What is imported stays: no need to look through it for garbage, which
    # would hold up requests for tenths of a second.
    gc.freeze()
    # Requests should not wait 5 ms for a thread that reads a large one.
    sys.setswitchinterval(0.001)

    # Each connection is a file.
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def serve():
        status = 0
        try:
            await Server(configs, batching, paths, values).run()
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            status = 1
        sys.stdout.flush()
        # Here and now: threads may still load or run what nobody waits for.
        os._exit(status)

    asyncio.run(serve())


if __name__ == "__main__":
    launch.launch(main, define_flags)
