"""Render the files of a deployment as text."""

import hashlib
import json
import os
import string
import textwrap
import typing

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from export.serving.config_files import PROMETHEUS_PATH

IMAGES = {
    "cpu": "tensorflow/serving:2.15.1",
    "gpu": "tensorflow/serving:2.15.1-gpu",
}
_TEMPLATES = os.path.join(os.path.dirname(__file__), "..", "templates")
_MONITORING = f"""\
prometheus_config {{
  enable: true
  path: "{PROMETHEUS_PATH}"
}}
"""
_CONFIG = "/config"  # in the container
_USER = 65534  # nobody
# Polling interval for the model's directory and models.config. The server logs
# about 300 bytes per poll, 13 MB a day.
_POLL_SECONDS = 2
# Threads for status, metadata and metrics while all others run predictions.
_SPARE_THREADS = 8
_COMPOSE_GPU = """\
        reservations:
          devices: [{driver: nvidia, count: 1, capabilities: [gpu]}]"""


class DeploymentSettings(typing.NamedTuple):
    """Settings of a deployment.

    Attributes:
        model_name: name of the model for clients, and of the Kubernetes
            objects.
        max_batch_size: images in the largest batch.
        batch_timeout_micros: microseconds to wait until a batch is full.
        clients: requests in progress at the same time.
        cpus: CPU cores of the container.
        memory_mb: memory of the container, in MiB.
        accelerator: key of `IMAGES`.
        batching: "on": batch the requests of several clients; "off": do not;
            "auto": only if a bad image cannot fail other requests.
    """

    model_name: str
    max_batch_size: int = 32
    batch_timeout_micros: int = 1000
    clients: int = 32
    cpus: int = 4
    memory_mb: int = 4096
    accelerator: str = "cpu"
    batching: str = "auto"


def batch_sizes(largest):
    """Returns the allowed batch sizes up to `largest`, ascending.

    A server pads each batch to the next size. Less than a third of a batch is
    padding.
    """
    powers = [1 << i for i in range(largest.bit_length())]
    sizes = {*powers, *(3 * power // 2 for power in powers[1:]), largest}
    return sorted(size for size in sizes if size <= largest)


def render(settings, source, *, versions, labels, batching):
    """Renders a deployment.

    Args:
        settings: `DeploymentSettings`.
        source: absolute directory of the versions on the host.
        versions: numbers of the versions to load.
        labels: label -> version.
        batching: whether the server batches requests of several clients.

    Returns:
        dictionary from file names to contents.
    """
    base_path = f"/models/{settings.model_name}"
    files = {
        "models.config": _models(
            settings.model_name, base_path, versions, labels
        ),
        "batching_parameters.txt": _batching(settings),
        "monitoring.config": _MONITORING,
    }
    values = _values(settings, source, base_path, files)
    values["files"] = "\n".join(
        f"  {name}: |\n" + textwrap.indent(text.rstrip(), " " * 4)
        for name, text in files.items()
    )
    arguments = "\n".join(f"- {x}" for x in _arguments(settings, batching))
    for name, indent in (("docker-compose.yml", 6), ("kubernetes.yaml", 12)):
        values["arguments"] = textwrap.indent(arguments, " " * indent)
        with open(os.path.join(_TEMPLATES, name), encoding="utf-8") as file:
            text = string.Template(file.read()).substitute(values)
        files[name] = text.rstrip() + "\n"
    return files


def _values(settings, source, base_path, files):
    """Returns the variables of the templates."""
    # The server polls models.config, but reads these only when it starts.
    once = files["batching_parameters.txt"] + files["monitoring.config"]
    status = f"/v1/models/{settings.model_name}"
    ready = f"{status}/labels/stable/metadata"
    gpu = settings.accelerator == "gpu"
    return settings._asdict() | {
        "name": settings.model_name,
        "image": IMAGES[settings.accelerator],
        "user": _USER,
        "source": _compose_text(source),
        "base_path": base_path,
        "config": _CONFIG,
        "metrics": PROMETHEUS_PATH,
        "alive": status,
        "ready": ready,
        "health": _compose_text(["CMD", "/bin/bash", "-c", _health(ready)]),
        "digest": hashlib.sha256(once.encode()).hexdigest()[:16],
        "devices": _COMPOSE_GPU if gpu else "",
        "gpus": ", nvidia.com/gpu: 1" if gpu else "",
    }


def _models(name, base_path, versions, labels):
    message = model_server_config_pb2.ModelServerConfig()
    model = message.model_config_list.config.add(
        name=name, base_path=base_path, model_platform="tensorflow"
    )
    model.model_version_policy.specific.versions.extend(versions)
    model.version_labels.update(labels)
    return text_format.MessageToString(message)


def _batching(settings):
    """Returns a `BatchingParameters` as text; no package contains its class.

    Source: tensorflow_serving/batching/README.md, "Performance Tuning";
    session_bundle_config.proto.
    """
    numbers = {
        "max_batch_size": settings.max_batch_size,
        "batch_timeout_micros": settings.batch_timeout_micros,
        # Enough even if every request needs a batch of its own.
        "max_enqueued_batches": settings.clients,
        "num_batch_threads": settings.cpus,
    }
    lines = [f"{k} {{ value: {v} }}" for k, v in numbers.items()]
    for size in batch_sizes(settings.max_batch_size):
        lines.append(f"allowed_batch_sizes: {size}")
    return "\n".join(lines) + "\n"


def _arguments(settings, batching):
    """Returns the flags of tensorflow_model_server."""
    # A request holds a thread while it waits for its batch or a core.
    threads = settings.clients + _SPARE_THREADS
    arguments = {
        "port": 8500,
        "rest_api_port": 8501,
        "model_config_file": f"{_CONFIG}/models.config",
        "model_config_file_poll_wait_seconds": _POLL_SECONDS,
        "file_system_poll_wait_seconds": _POLL_SECONDS,
        "monitoring_config_file": f"{_CONFIG}/monitoring.config",
        # When a server starts, no version with a label is available yet.
        "allow_version_labels_for_unavailable_models": "true",
        # A failed load is reported immediately instead of after five minutes.
        "max_num_load_retries": 0,
        "grpc_max_threads": threads,
        "rest_api_num_threads": threads,
        # The default is the number of cores of the machine, not the container.
        "tensorflow_intra_op_parallelism": settings.cpus,
        "tensorflow_inter_op_parallelism": settings.cpus,
        "enable_grpc_healthcheck_service": "true",
        # The default, true, opens the profiler to all gRPC clients.
        "enable_profiler": "false",
    }
    if batching:  # the server accepts both flags or none
        arguments |= {
            "enable_batching": "true",
            "batching_parameters_file": f"{_CONFIG}/batching_parameters.txt",
        }
    return [f"--{name}={value}" for name, value in arguments.items()]


def _health(path):
    """Returns a bash script that succeeds if GET `path` returns 200."""
    return (
        "exec 3<>/dev/tcp/127.0.0.1/8501 && "
        f"printf 'GET {path} HTTP/1.1\\r\\nHost: localhost\\r\\n"
        "Connection: close\\r\\n\\r\\n' >&3 && "
        "read -r -t 5 status <&3 && [[ $status == *' 200 '* ]]"
    )


def _compose_text(value):
    """Returns a value as JSON, which is valid YAML, escaped for Compose."""
    return json.dumps(value, ensure_ascii=False).replace("$", "$$")
