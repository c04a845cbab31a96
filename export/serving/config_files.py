"""Read the configuration files of TensorFlow Serving."""

import os

from google.protobuf import (
    descriptor_pb2,
    message_factory,
    text_format,
    wrappers_pb2,
)
from tensorflow_serving.config import model_server_config_pb2

from clsa_tf.errors import UserError

# Messages that are not part of any Python package.
# Source: tensorflow_serving/servables/tensorflow/session_bundle_config.proto,
# tensorflow_serving/config/monitoring_config.proto.
_MESSAGES = """
name: "clsa_tf/serving.proto" package: "clsa_tf" syntax: "proto3"
dependency: "google/protobuf/wrappers.proto"
message_type { name: "BatchingParameters"
  field { number: 1 name: "max_batch_size" %(int64)s }
  field { number: 2 name: "batch_timeout_micros" %(int64)s }
  field { number: 3 name: "max_enqueued_batches" %(int64)s }
  field { number: 4 name: "num_batch_threads" %(int64)s }
  field { number: 5 name: "thread_pool_name"
          type: TYPE_MESSAGE type_name: ".google.protobuf.StringValue" }
  field { number: 6 name: "allowed_batch_sizes"
          type: TYPE_INT64 label: LABEL_REPEATED }
  field { number: 7 name: "pad_variable_length_inputs" type: TYPE_BOOL }
  field { number: 8 name: "enable_large_batch_splitting"
          type: TYPE_MESSAGE type_name: ".google.protobuf.BoolValue" }
  field { number: 9 name: "max_execution_batch_size" %(int64)s } }
message_type { name: "PrometheusConfig"
  field { number: 1 name: "enable" type: TYPE_BOOL }
  field { number: 2 name: "path" type: TYPE_STRING } }
message_type { name: "MonitoringConfig"
  field { number: 1 name: "prometheus_config"
          type: TYPE_MESSAGE type_name: ".clsa_tf.PrometheusConfig" } }
""" % {"int64": 'type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value"'}
PROMETHEUS_PATH = "/monitoring/prometheus/metrics"
_INT32_MAX = 2**31 - 1
_MODELS = "the configuration of the models"


def read_batching_parameters(path=""):
    """Reads a `batching_parameters.txt`.

    Args:
        path: path of the file; "": use TensorFlow Serving's defaults.

    Returns:
        keyword arguments of `tf.nondifferentiable_batch_function`.

    Raises:
        UserError: the file cannot be read or a value is invalid.
    """
    parameters = {
        "max_batch_size": 1000,
        "batch_timeout_micros": 0,
        "max_enqueued_batches": 10,
        "num_batch_threads": os.cpu_count() or 1,
    }
    message = _message("BatchingParameters")
    if path:
        _read(path, message)
    if message.pad_variable_length_inputs:
        raise _error("pad_variable_length_inputs: false", "true", path)
    if message.enable_large_batch_splitting.value:
        raise _error("enable_large_batch_splitting: false", "true", path)
    for name in parameters:
        minimum = 0 if name == "batch_timeout_micros" else 1
        if message.HasField(name):
            parameters[name] = getattr(message, name).value
        if not minimum <= parameters[name] <= _INT32_MAX:
            expected = f"{name} from {minimum} to {_INT32_MAX}"
            raise _error(expected, parameters[name], path)
    sizes = list(message.allowed_batch_sizes)
    largest = parameters["max_batch_size"]
    ascending = sizes == sorted({size for size in sizes if size > 0})
    if sizes and not (ascending and sizes[-1] == largest):
        expected = "positive allowed_batch_sizes in ascending order, the last "
        expected += f"equal to max_batch_size, {largest}"
        raise _error(expected, sizes, path)
    return parameters | {"allowed_batch_sizes": sizes or None}


def read_monitoring_path(path):
    """Returns the path of the metrics in a `monitoring.config`; None: disabled.

    Raises:
        UserError: the file cannot be read or the path is invalid.
    """
    message = _message("MonitoringConfig")
    config = _read(path, message).prometheus_config
    metrics_path = config.path or PROMETHEUS_PATH
    if not metrics_path.startswith("/") or metrics_path.startswith("/v1/"):
        expected = "a path that starts with a slash and is not below /v1/"
        raise _error(expected, repr(metrics_path), path)
    return metrics_path if config.enable else None


def read_model_configs(path):
    """Reads the `ModelConfig`s of a `models.config`.

    Raises:
        UserError: the file cannot be read or is invalid.
    """
    message = model_server_config_pb2.ModelServerConfig()
    return model_configs(_read(path, message))


def model_configs(message):
    """Checks a `ModelServerConfig` and returns its `ModelConfig`s.

    Raises:
        UserError: it is invalid.

    Source: tensorflow_serving/model_servers/server_core.cc,
    ValidateModelConfigList.
    """
    if message.WhichOneof("config") != "model_config_list":
        received = message.WhichOneof("config") or "none"
        raise _error("a model_config_list", received, _MODELS)
    configs = list(message.model_config_list.config)
    names = [config.name for config in configs]
    for config in configs:
        name, path = config.name, config.base_path
        if not name or "/" in name:
            raise _error("a model name without a slash", repr(name), _MODELS)
        if names.count(name) > 1:
            expected = "each model once"
            raise _error(expected, f"{name!r} several times", _MODELS)
        if "://" not in path and not os.path.isabs(path):
            expected = f"an absolute path or URI for model {name!r}"
            raise _error(expected, repr(path), _MODELS)
        platform = config.model_platform
        # `model_type` is the older, deprecated field; 1 is TENSORFLOW.
        if platform != "tensorflow" and (platform or config.model_type != 1):
            expected = f"model_platform 'tensorflow' for model {name!r}"
            raise _error(expected, repr(platform), _MODELS)
        policy = config.model_version_policy
        if policy.HasField("specific") and not policy.specific.versions:
            expected = f"versions in the specific policy of model {name!r}"
            raise _error(expected, "none", _MODELS)
    return configs


def wanted_versions(config, present):
    """Selects versions by the version policy of a `ModelConfig`.

    Args:
        config: the `ModelConfig`.
        present: numbers of the existing versions.

    Returns:
        list of numbers, ascending.

    Source: tensorflow_serving/sources/storage_path/
    file_system_storage_path_source.cc, AspireLatestVersions and siblings.
    """
    policy, present = config.model_version_policy, sorted(present)
    if policy.HasField("specific"):
        return [n for n in present if n in policy.specific.versions]
    if policy.HasField("all"):
        return present
    return present[-max(policy.latest.num_versions, 1) :]


def _message(name):
    """Returns an empty message of a type in `_MESSAGES`."""
    wrappers = descriptor_pb2.FileDescriptorProto()
    wrappers_pb2.DESCRIPTOR.CopyToProto(wrappers)
    file = text_format.Parse(_MESSAGES, descriptor_pb2.FileDescriptorProto())
    # A separate descriptor pool needs the wrappers, too.
    return message_factory.GetMessages([wrappers, file])[f"clsa_tf.{name}"]()


def _read(path, message):
    try:
        with open(path, encoding="utf-8") as file:
            return text_format.Parse(file.read(), message)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as e:
        kind = message.DESCRIPTOR.name
        raise UserError(
            f"Cannot read {path} as a {kind} in protobuf's text format: "
            f"{' '.join(str(e).split())}; correct the file."
        ) from e


def _error(expected, received, place):
    return UserError(
        f"Expected {expected}, received {received}; correct {place}."
    )
