"""Check the files of a deployment by the rules of TensorFlow Serving."""

import os

import yaml

from clsa_tf.errors import UserError
from export.serving import config_files

# The flags of tensorflow_model_server 2.15.1.
# Source: tensorflow_serving/model_servers/main.cc at tag 2.15.1.
FLAGS = frozenset(
    """
    allow_version_labels_for_unavailable_models batching_parameters_file
    enable_batching enable_grpc_healthcheck_service enable_model_warmup
    enable_per_model_batching_parameters enable_profiler
    enable_signature_method_name_check file_system_poll_wait_seconds
    flush_filesystem_caches grpc_channel_arguments grpc_max_threads
    grpc_socket_path load_retry_interval_micros max_num_load_retries
    mixed_precision model_base_path model_config_file
    model_config_file_poll_wait_seconds model_name monitoring_config_file
    num_load_threads num_request_iterations_for_warmup
    num_tflite_interpreters_per_pool num_tflite_pools num_unload_threads
    per_process_gpu_memory_fraction platform_config_file port
    prefer_tflite_model remove_unused_fields_from_bundle_metagraph
    rest_api_enable_cors_support rest_api_num_threads rest_api_port
    rest_api_timeout_in_ms saved_model_tags skip_initialize_tpu
    ssl_config_file tensorflow_inter_op_parallelism
    tensorflow_intra_op_parallelism tensorflow_session_config_file
    tensorflow_session_parallelism thread_pool_factory_config_file
    use_alts_credentials version xla_cpu_compilation_enabled
    """.split()
)
SETTINGS = ("models.config", "batching_parameters.txt", "monitoring.config")
_ADVICE = "write the deployment again with `export.deploy`"


def check_deployment(folder):
    """Checks a deployment by the rules of the server.

    Args:
        folder: output directory of `export.deploy`.

    Raises:
        UserError: a file is missing or cannot be parsed, a label has no
            version, or a flag does not exist or names a missing file.
    """
    path = os.path.join(folder, "models.config")
    for model in config_files.read_model_configs(path):
        versions = model.model_version_policy.specific.versions
        if not set(model.version_labels.values()) <= set(versions):
            labels = dict(model.version_labels)
            expected = f"labels of the versions {list(versions)}"
            raise UserError(_message(expected, path, labels))
    config_files.read_batching_parameters(
        os.path.join(folder, "batching_parameters.txt")
    )
    path = os.path.join(folder, "monitoring.config")
    if not config_files.read_monitoring_path(path):
        expected = "prometheus_config.enable: true"
        raise UserError(_message(expected, path, "false"))
    _check_compose(folder)
    _check_kubernetes(folder)


def _check_compose(folder):
    path = os.path.join(folder, "docker-compose.yml")
    (document,) = _documents(path)
    try:
        service = document["services"]["serving"]
        arguments = service["command"]
        targets = [volume["target"] for volume in service["volumes"]]
    except (KeyError, TypeError) as e:
        expected = "services.serving with command and volumes"
        raise UserError(_message(expected, path, repr(e))) from e
    _check_arguments(arguments, targets, path)


def _check_kubernetes(folder):
    path = os.path.join(folder, "kubernetes.yaml")
    try:
        kinds = {document["kind"]: document for document in _documents(path)}
        pod = kinds["Deployment"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        arguments = container["args"]
        targets = [mount["mountPath"] for mount in container["volumeMounts"]]
        data = kinds["ConfigMap"]["data"]
    except (KeyError, TypeError, ValueError) as e:
        expected = "a Deployment with one container and a ConfigMap"
        raise UserError(_message(expected, path, repr(e))) from e
    _check_arguments(arguments, targets, path)
    for name in SETTINGS:
        if data.get(name) != _text(os.path.join(folder, name)):
            expected = f"the content of {os.path.join(folder, name)}"
            raise UserError(_message(expected, path, f"another {name}"))


def _check_arguments(arguments, targets, path):
    """Checks the flags of tensorflow_model_server."""
    names = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name[:2] != "--" or name[2:] not in FLAGS or name[2:] in names:
            expected = "flags of tensorflow_model_server, each once"
            raise UserError(_message(expected, path, name))
        names[name[2:]] = value
    for name, value in names.items():
        if name.endswith("_file") and (
            os.path.dirname(value) not in targets
            or os.path.basename(value) not in SETTINGS
        ):
            expected = f"one of {', '.join(SETTINGS)} in a mounted directory"
            raise UserError(_message(expected, path, f"--{name}={value}"))
    # Source: tensorflow_serving/model_servers/server.cc, Server::BuildAndStart.
    if ("batching_parameters_file" in names) != ("enable_batching" in names):
        expected = "--enable_batching and --batching_parameters_file or neither"
        raise UserError(_message(expected, path, "only one of them"))


def _documents(path):
    try:
        return list(yaml.safe_load_all(_text(path)))
    except yaml.YAMLError as e:
        problem = " ".join(str(e).split())
        raise UserError(_message("YAML", path, problem)) from e


def _text(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"Cannot read {path}: {e}; {_ADVICE}.") from e


def _message(expected, path, received):
    return f"Expected {expected} in {path}, received {received}; {_ADVICE}."
