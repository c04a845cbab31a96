"""Serves exported encoders over gRPC and REST, as TensorFlow Serving does.

    python -m export.server --model_base_path=models/photos

A server in Python for laptops and tests, with TensorFlow Serving's interfaces,
statuses and flags. Unlike there, it listens on the loopback interface only
unless --host says otherwise, and requests are batched unless
--noenable_batching is passed.

SIGTERM and SIGINT (Ctrl-C) let it finish what it has and end, with exit status
0; the second one ends it at once.
"""

import asyncio
import gc
import os
import sys

import tensorflow as tf
from absl import flags

from clsa_tf import entry
from clsa_tf.errors import UserError
from clsa_tf.files import newest_savedmodel
from clsa_tf.spelling import define_path
from export.serving import settings

try:
    from export.serving.metrics import read_monitoring_path
    from export.serving.process import HELD_BODIES, Server
except ModuleNotFoundError as e:
    raise SystemExit(
        f"error: Expected the packages of the server, received: {e}; install "
        "them: pip install 'clsa_tf[serve]'."
    ) from e

_ANY_PORT = "0: not served, as in TensorFlow Serving; -1: any free port"
_PORTS = dict(lower_bound=-1, upper_bound=2**16 - 1)
_PATH = dict(path=True)
_FROM_0 = dict(lower_bound=0)
_FROM_1 = dict(lower_bound=1)
# Name, default, help and limits: first TensorFlow Serving's, then ours.
_FLAGS = (
    ("port", 8500, f"port of gRPC; {_ANY_PORT}", _PORTS),
    ("rest_api_port", 8501, f"port of REST; {_ANY_PORT}", _PORTS),
    (
        "rest_api_timeout_in_ms",
        30_000,
        "milliseconds from a REST request's first byte to its answer",
        _FROM_1,
    ),
    ("model_name", "default", "name of the one model"),
    (
        "model_base_path",
        "",
        "directory of the one model's versions",
        _PATH,
    ),
    (
        "model_config_file",
        "",
        "ModelServerConfig in text format: the models instead of one",
        _PATH,
    ),
    (
        "model_config_file_poll_wait_seconds",
        0,
        "seconds between looks at --model_config_file; 0: only at the start",
        _FROM_0,
    ),
    (
        "file_system_poll_wait_seconds",
        1,
        "seconds between looks for new versions; 0: only at the start",
        _FROM_0,
    ),
    (
        "max_num_load_retries",
        5,
        "attempts to load a version after the first that failed",
        _FROM_0,
    ),
    (
        "load_retry_interval_micros",
        60_000_000,
        "microseconds between attempts to load a version",
        _FROM_0,
    ),
    (
        "enable_model_warmup",
        True,
        "whether to run a version's warm-up requests before it is served",
    ),
    (
        "allow_version_labels_for_unavailable_models",
        False,
        "whether labels may name versions that are not available (yet)",
    ),
    (
        "enable_batching",
        True,
        "whether to run requests of several clients together (TensorFlow "
        "Serving's default: false)",
    ),
    (
        "batching_parameters_file",
        "",
        "BatchingParameters in text format",
        _PATH,
    ),
    (
        "monitoring_config_file",
        "",
        "MonitoringConfig in text format: where to tell metrics besides "
        "/metrics",
        _PATH,
    ),
    (
        "tensorflow_intra_op_parallelism",
        0,
        "threads within an operation; 0: TensorFlow decides",
        _FROM_0,
    ),
    (
        "tensorflow_inter_op_parallelism",
        0,
        "threads for operations at the same time; 0: TensorFlow decides",
        _FROM_0,
    ),
    (
        "host",
        "127.0.0.1",
        "address to listen at; 0.0.0.0 for everyone who can reach this "
        "machine: there is neither a password nor encryption",
    ),
    (
        "max_request_bytes",
        2**26,
        "size in bytes of the largest request; all that are in progress may "
        f"have {HELD_BODIES} times as much",
        dict(lower_bound=1, upper_bound=2**31 - 1),
    ),
    (
        "max_concurrent_requests",
        2048,
        "requests in progress, beyond which they are refused",
        _FROM_1,
    ),
    (
        "drain_seconds",
        30.0,
        "seconds that requests in progress have to finish after SIGTERM",
        _FROM_0,
    ),
)


def read_flags(values):
    """Makes settings of the flags, and reads the files they name.

    Args:
        values: the flags.

    Returns:
        list of `ModelConfig`; `BatchingParameters`, None without batching;
        paths where metrics are told.

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
        configs = [settings.ModelConfig(values.model_name, path)]
    settings.check_models(configs)
    for config in configs:
        _check_versions(config)
    batching = settings.BatchingParameters() if values.enable_batching else None
    if values.batching_parameters_file:
        batching = settings.read_batching_parameters(
            values.batching_parameters_file
        )
    paths = ["/metrics"]
    if values.monitoring_config_file:
        path = read_monitoring_path(values.monitoring_config_file)
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
    for wrong, expected, received in (
        (
            bool(values.model_base_path) == bool(values.model_config_file),
            "either --model_base_path or --model_config_file",
            "both" if values.model_base_path else "neither",
        ),
        (
            values.batching_parameters_file and not values.enable_batching,
            "batching for --batching_parameters_file",
            "--noenable_batching",
        ),
        (
            values.model_config_file_poll_wait_seconds
            and not values.model_config_file,
            "--model_config_file for --model_config_file_poll_wait_seconds",
            "none",
        ),
        (
            values.monitoring_config_file and not values.rest_api_port,
            "a REST port for --monitoring_config_file",
            "--rest_api_port=0",
        ),
        (
            values.port == values.rest_api_port != -1,
            "different ports, at least one of them not 0",
            f"--port={values.port} --rest_api_port={values.rest_api_port}",
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
    for name, default, text, *options in _FLAGS:
        limits = options[0] if options else {}
        define = kinds[type(default)]
        if limits is _PATH:
            define, limits = define_path, {}
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

    async def serve():
        await Server(configs, batching, paths, values).run()
        sys.stdout.flush()
        # Here and now: threads may still load or run what nobody waits for.
        os._exit(0)

    asyncio.run(serve())


if __name__ == "__main__":
    entry.launch(main, define_flags)
