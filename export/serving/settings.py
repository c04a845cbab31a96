"""The settings files of TensorFlow Serving, as dataclasses."""

import dataclasses
import os

from google.protobuf import (
    descriptor_pb2,
    message_factory,
    text_format,
    wrappers_pb2,
)
from tensorflow_serving.config import model_server_config_pb2

from clsa_tf.errors import UserError

_INT64 = ".google.protobuf.Int64Value"
_NUMBERS = (
    "max_batch_size",
    "batch_timeout_micros",
    "max_enqueued_batches",
    "num_batch_threads",
)


@dataclasses.dataclass(frozen=True)
class BatchingParameters:
    """How requests are put together, named as TensorFlow Serving names it.

    Attributes:
        max_batch_size: rows of the largest batch that is run.
        batch_timeout_micros: microseconds that the first request of a batch
            waits for others although an executor is free.
        max_enqueued_batches: times `max_batch_size` rows may wait.
        num_batch_threads: batches that run at the same time. Two, so that
            one is decoded, joined and cut while another computes.
        allowed_batch_sizes: batches are padded to the next of these,
            ascending, the last equal to `max_batch_size`; (): any size.

    Raises:
        UserError: when made of values outside these ranges.
    """

    max_batch_size: int = 32
    batch_timeout_micros: int = 0
    max_enqueued_batches: int = 64
    num_batch_threads: int = 2
    allowed_batch_sizes: tuple = ()

    def __post_init__(self):
        """Checks."""
        for name in _NUMBERS:
            least = 0 if name == "batch_timeout_micros" else 1
            if getattr(self, name) < least:
                raise UserError(
                    f"Expected {name} of at least {least}, received "
                    f"{getattr(self, name)}; correct the batching parameters."
                )
        sizes = self.allowed_batch_sizes
        if sizes and (
            list(sizes) != sorted({size for size in sizes if size > 0})
            or sizes[-1] != self.max_batch_size
        ):
            raise UserError(
                "Expected ascending positive allowed_batch_sizes of which the "
                f"last equals max_batch_size, {self.max_batch_size}, received "
                f"{list(sizes)}; correct the batching parameters."
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model to serve.

    Attributes:
        name: by which clients ask for it.
        base_path: absolute directory or URI of its versions.
        versions: the ones to serve; (): by `latest` or `all_versions`.
        all_versions: whether to serve every version that is there.
        latest: how many of the newest versions to serve otherwise.
        labels: names of versions, label -> version.
    """

    name: str
    base_path: str
    versions: tuple = ()
    all_versions: bool = False
    latest: int = 1
    labels: dict = dataclasses.field(default_factory=dict)

    def wanted(self, present):
        """Which of the versions that are present to serve, ascending.

        Source: tensorflow_serving/sources/storage_path/
        file_system_storage_path_source.cc, AspireLatestVersions and siblings.
        """
        present = sorted(present)
        if self.versions:
            return [number for number in present if number in self.versions]
        if self.all_versions:
            return present
        return present[-self.latest :]


def read_batching_parameters(path):
    """Reads a `batching_parameters.txt`.

    Returns:
        `BatchingParameters`; what the file leaves out has its default.

    Raises:
        UserError: no such file, not that format, values out of range.
    """
    message = _read(path, _batching_message()(), "BatchingParameters")
    if message.pad_variable_length_inputs:
        raise UserError(
            "Expected pad_variable_length_inputs: false, received true in "
            f"{path}; leave it out, only requests of equal shapes are joined."
        )
    found = {
        name: getattr(message, name).value
        for name in _NUMBERS
        if message.HasField(name)
    }
    sizes = tuple(message.allowed_batch_sizes)
    return BatchingParameters(**found, allowed_batch_sizes=sizes)


def read_model_configs(path):
    """Reads a `models.config`.

    Returns:
        list of `ModelConfig`.

    Raises:
        UserError: no such file, not that format, or as `model_configs`.
    """
    message = model_server_config_pb2.ModelServerConfig()
    return model_configs(_read(path, message, "ModelServerConfig"))


def model_configs(message):
    """Makes `ModelConfig`s of a `ModelServerConfig`.

    Raises:
        UserError: no models, a platform other than TensorFlow, or as
            `check_models`.
    """
    if message.WhichOneof("config") != "model_config_list":
        raise UserError(
            "Expected a model_config_list, received "
            f"{message.WhichOneof('config') or 'none'}; write "
            "model_config_list { config { ... } }."
        )
    configs = [_model(one) for one in message.model_config_list.config]
    check_models(configs)
    return configs


def check_models(configs):
    """Raises `UserError` unless the names and paths can be served.

    Source: tensorflow_serving/model_servers/server_core.cc,
    ValidateModelConfigList.
    """
    names = [config.name for config in configs]
    for config in configs:
        if not config.name or "/" in config.name:
            raise UserError(
                "Expected a model name without a slash, received "
                f"{config.name!r}; name the model otherwise."
            )
        if names.count(config.name) > 1:
            raise UserError(
                f"Expected each model once, received {config.name!r} several "
                "times; give each a name of its own."
            )
        path = config.base_path
        if "://" not in path and not os.path.isabs(path):
            raise UserError(
                f"Expected an absolute path or URI for model {config.name!r}, "
                f"received {path!r}; write it in full."
            )


def _model(message):
    platform = message.model_platform
    # The older way of saying it, an enum: 1 is TENSORFLOW.
    if platform != "tensorflow" and (platform or message.model_type != 1):
        raise UserError(
            f"Expected model_platform 'tensorflow' for model {message.name!r}, "
            f"received {platform!r}; correct it."
        )
    policy = message.model_version_policy
    kind = policy.WhichOneof("policy_choice") or "latest"
    versions = tuple(policy.specific.versions)
    if kind == "specific" and not versions:
        raise UserError(
            f"Expected the versions to serve of model {message.name!r}, "
            "received an empty specific policy; name them."
        )
    return ModelConfig(
        name=message.name,
        base_path=message.base_path,
        versions=versions,
        all_versions=kind == "all",
        latest=max(policy.latest.num_versions, 1),
        labels=dict(message.version_labels),
    )


def _read(path, message, kind):
    try:
        with open(path, encoding="utf-8") as file:
            return text_format.Parse(file.read(), message)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as e:
        raise UserError(
            f"Expected a {kind} in protobuf's text format, received {path}: "
            f"{' '.join(str(e).split())}; correct the file."
        ) from e


def _batching_message():
    """The class of the message, which no Python package contains.

    Source: tensorflow_serving/servables/tensorflow/session_bundle_config.proto
    """
    field = descriptor_pb2.FieldDescriptorProto
    wrappers = descriptor_pb2.FileDescriptorProto()
    wrappers_pb2.DESCRIPTOR.CopyToProto(wrappers)
    file = descriptor_pb2.FileDescriptorProto(
        name="clsa_tf/batching_parameters.proto",
        package="clsa_tf",
        dependency=[wrappers.name],
        syntax="proto3",
    )
    message = file.message_type.add(name="BatchingParameters")
    for number, name in enumerate([*_NUMBERS, "thread_pool_name"], 1):
        message.field.add(
            name=name,
            number=number,
            type=field.TYPE_MESSAGE,
            type_name=_INT64.replace("Int64", "String")
            if name == "thread_pool_name"
            else _INT64,
            label=field.LABEL_OPTIONAL,
        )
    message.field.add(
        name="allowed_batch_sizes",
        number=6,
        type=field.TYPE_INT64,
        label=field.LABEL_REPEATED,
    )
    message.field.add(
        name="pad_variable_length_inputs",
        number=7,
        type=field.TYPE_BOOL,
        label=field.LABEL_OPTIONAL,
    )
    # In a pool of its own, which has to have the wrappers too.
    classes = message_factory.GetMessages([wrappers, file])
    return classes["clsa_tf.BatchingParameters"]
