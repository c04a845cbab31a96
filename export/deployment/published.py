"""The versions of a model that an export left, and what they can bear."""

import json
import os
import typing

from google.protobuf.message import DecodeError

from clsa_tf.errors import UserError, first_line

# What a SavedModel cannot be without.
_PARTS = ("saved_model.pb", "variables/variables.index")


class Model(typing.NamedTuple):
    """A version of a model.

    Attributes:
        path: directory of the SavedModel.
        marks_bad_images: whether a bad image gives a row of NaN, and does not
            fail its request.
    """

    path: str
    marks_bad_images: bool


def newest(base_path):
    """Number of the newest version in a directory.

    Raises:
        UserError: no such directory, or no version in it.
    """
    found = _versions(base_path)
    if not found:
        raise UserError(
            f"Expected versions of a model, received {base_path}, which has "
            "none; export one with `python -m export.savedmodel`."
        )
    return found[-1]


def read(base_path, version):
    """Reads what there is to know about a version.

    Returns:
        `Model`.

    Raises:
        UserError: it is missing, incomplete, damaged, or not one of ours.
    """
    path = os.path.join(base_path, str(version))
    found = _versions(base_path)
    if version not in found:
        names = ", ".join(map(str, found)) or "none"
        raise UserError(
            f"Expected a version of {base_path} (there: {names}), received "
            f"{version}; name one of these."
        )
    for part in _PARTS:
        if not os.path.isfile(os.path.join(path, part)):
            raise UserError(
                f"Expected a complete version, received {path}, which has no "
                f"{part}; wait until it is copied, or export it again."
            )
    return Model(path, "valid" in _signature(path).outputs)


def warmup_images(model):
    """Images in the largest request of a `Model`'s warm-up; 0: there is none.

    Raises:
        UserError: the file is damaged.
    """
    from export.model import warmup

    path = os.path.join(model.path, warmup.PATH)
    if not os.path.exists(path):
        return 0
    try:
        return max(
            (
                tensor.tensor_shape.dim[0].size
                for request in warmup.read(path)
                for tensor in request.inputs.values()
            ),
            default=0,
        )
    except (ValueError, warmup.tf.errors.DataLossError) as e:
        raise UserError(
            f"Expected the requests of a warm-up, received {path}: "
            f"{first_line(e)}; copy or export the version again."
        ) from e


def max_images(model):
    """Images that a request to a `Model` may have, by its model card.

    Raises:
        UserError: there is no such card.
    """
    path = os.path.join(model.path, "model_card.json")
    try:
        with open(path, encoding="utf-8") as file:
            return int(json.load(file)["limits"]["batch_images"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"Expected a model card with its limits, received {path}: {e!r}; "
            "copy or export the version again."
        ) from e


def _versions(base_path):
    try:
        names = os.listdir(base_path)
    except OSError as e:
        raise UserError(
            f"Expected a directory of a model's versions, received {base_path}:"
            f" {e.strerror}; set --model_base_path."
        ) from e
    numbers = [int(n) for n in names if n.isdecimal() and n == str(int(n))]
    return sorted(n for n in numbers if n < 2**63)


def _signature(path):
    """The `SignatureDef` that answers unless another is asked for."""
    from tensorflow.core.protobuf import saved_model_pb2

    with open(os.path.join(path, _PARTS[0]), "rb") as file:
        data = file.read()
    try:
        saved = saved_model_pb2.SavedModel.FromString(data)
    except DecodeError as e:
        raise UserError(
            f"Expected a SavedModel, received {path}, whose {_PARTS[0]} is "
            "damaged; copy or export it again."
        ) from e
    for graph in saved.meta_graphs:
        served = "serve" in graph.meta_info_def.tags
        if served and "serving_default" in graph.signature_def:
            return graph.signature_def["serving_default"]
    raise UserError(
        "Expected a model with the tag serve and the signature "
        f"serving_default, received {path}; export it again."
    )
