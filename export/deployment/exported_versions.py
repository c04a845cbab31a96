"""Read exported versions of a model and their limits."""

import json
import os
import typing

import tensorflow as tf
from google.protobuf.message import DecodeError

from clsa_tf.errors import UserError, first_line
from clsa_tf.files import MODEL_CARD, export_written_by

# Files without which a SavedModel is incomplete.
_PARTS = ("saved_model.pb", "variables/variables.index")


class ExportedVersion(typing.NamedTuple):
    """A version of a model.

    Attributes:
        path: directory of the SavedModel.
        marks_bad_images: whether a bad image gives a row of NaN instead of
            failing its request.
    """

    path: str
    marks_bad_images: bool


def newest(base_path):
    """Returns the number of the newest version in a directory.

    Raises:
        UserError: the directory does not exist or has no version.
    """
    versions = _versions(base_path)
    if not versions:
        raise UserError(
            "Expected a directory of versions as --model_base_path, received "
            f"{base_path} without any; export one with `python -m "
            "export.savedmodel`."
        )
    return versions[-1]


def read(base_path, version):
    """Reads the properties of a version.

    Returns:
        `ExportedVersion`.

    Raises:
        UserError: the version is missing, incomplete or damaged, or not
            exported by this project.
    """
    path = os.path.join(base_path, str(version))
    versions = _versions(base_path)
    if version not in versions:
        numbers = ", ".join(map(str, versions)) or "none"
        raise UserError(
            f"Expected a version in {base_path} (found: {numbers}), received "
            f"{version}; choose one of these."
        )
    for part in _PARTS:
        if not os.path.isfile(os.path.join(path, part)):
            raise UserError(
                f"Expected a complete version, received {path} without {part}; "
                "wait until it is copied, or export it again."
                + export_written_by(path)
            )
    return ExportedVersion(path, "valid" in _signature(path).outputs)


def warmup_images(model):
    """Returns the images in the largest warm-up request of a version, or 0.

    Raises:
        UserError: the file of the warm-up requests is damaged.
    """
    from export.model import warmup_requests

    path = os.path.join(model.path, warmup_requests.PATH)
    if not os.path.exists(path):
        return 0
    try:
        return max(
            (
                tensor.tensor_shape.dim[0].size
                for request in warmup_requests.read(path)
                for tensor in request.inputs.values()
            ),
            default=0,
        )
    except (ValueError, tf.errors.DataLossError) as e:
        raise UserError(
            f"Cannot read the warm-up requests in {path}: {first_line(e)}; "
            "copy or export the version again." + export_written_by(model.path)
        ) from e


def max_images(model):
    """Returns the maximum number of images per request, from the model card.

    Raises:
        UserError: the model card is missing or damaged.
    """
    path = os.path.join(model.path, MODEL_CARD)
    try:
        with open(path, encoding="utf-8") as file:
            return int(json.load(file)["limits"]["batch_images"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"Cannot read the limits in the model card {path}: {e!r}; copy or "
            "export the version again." + export_written_by(model.path)
        ) from e


def _versions(base_path):
    try:
        names = os.listdir(base_path)
    except OSError as e:
        raise UserError(
            f"Cannot list the versions in {base_path}: {e.strerror}; correct "
            "--model_base_path."
        ) from e
    numbers = [int(n) for n in names if n.isdecimal() and n == str(int(n))]
    return sorted(n for n in numbers if n < 2**63)


def _signature(path):
    """Returns the default `SignatureDef` of a SavedModel."""
    from tensorflow.core.protobuf import saved_model_pb2

    with open(os.path.join(path, _PARTS[0]), "rb") as file:
        data = file.read()
    try:
        saved = saved_model_pb2.SavedModel.FromString(data)
    except DecodeError as e:
        raise UserError(
            f"Cannot read {_PARTS[0]} in {path}: the file is damaged; copy or "
            "export the version again." + export_written_by(path)
        ) from e
    for graph in saved.meta_graphs:
        served = "serve" in graph.meta_info_def.tags
        if served and "serving_default" in graph.signature_def:
            return graph.signature_def["serving_default"]
    raise UserError(
        "Expected a SavedModel with the tag serve and the signature "
        f"serving_default, received {path} without them; export it again."
        + export_written_by(path)
    )
