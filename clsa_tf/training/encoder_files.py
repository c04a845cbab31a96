"""Reads encoders from runs, exports and Keras files."""

import json
import os
import zipfile

import tensorflow as tf
from tensorflow import keras

from clsa_tf import config as config_lib
from clsa_tf.errors import UserError, first_line
from clsa_tf.files import MODEL_CARD, export_written_by, newest_savedmodel
from clsa_tf.networks import backbones
from clsa_tf.networks.backbones.resnet import STEMS
from clsa_tf.networks.encoder import weight_name
from clsa_tf.networks.functional import (
    FEATURES,
    NORMALISE,
    PROJECTION,
    architecture,
    from_encoder,
    functional_of,
)
from clsa_tf.networks.heads import KINDS
from clsa_tf.training.checkpoint import load_trained

# File that export.formats writes.
KERAS_FILE = "encoder.keras"

_ACCEPTED = (
    "the directory of a run, of an exported version or of the versions, or "
    f"the file {KERAS_FILE}"
)


def read(path):
    """Reads an encoder from a run, an export or a Keras file.

    Args:
        path: see `load_encoder`.

    Returns:
        (`keras.Model`, see `clsa_tf.networks.functional`; its `architecture`,
        or None if that is not recorded).

    Raises:
        UserError: there is no encoder, or it is damaged.
    """
    if os.path.isfile(path):
        return _from_keras(path), None
    if os.path.exists(os.path.join(path, config_lib.RUN_FLAGS)):
        trained = load_trained(path)
        model = from_encoder(trained.encoder, trained.config)
        return model, architecture(trained.config)
    if os.path.exists(os.path.join(path, KERAS_FILE)):
        return _from_keras(os.path.join(path, KERAS_FILE)), None
    exported = newest_savedmodel(path)
    if exported:
        return _from_export(exported)
    raise UserError(
        f"Expected {_ACCEPTED}, received {path!r}, which "
        f"{'is none of them' if os.path.exists(path) else 'does not exist'}; "
        "check the path."
    )


def _from_export(path):
    """Reads the variables that `export.model.served` saves by name."""
    try:
        with open(os.path.join(path, MODEL_CARD), encoding="utf-8") as file:
            spec = json.load(file)["encoder"]
        unknown = backbones.problem(spec["backbone"])
        known = spec["stem"] in STEMS and spec["head"]["kind"] in KINDS
        if unknown or not known:
            raise ValueError(f"unknown architecture {spec}")
        model = functional_of(spec)
        weights = {weight_name(v): v for v in model.variables}
        reader = tf.train.Checkpoint(weights=weights)
        status = reader.read(os.path.join(path, "variables", "variables"))
        status.expect_partial().assert_existing_objects_matched()
    # The type of the exception depends on the damage.
    except Exception as e:
        raise UserError(
            f"Expected a model with its {MODEL_CARD} and variables, as "
            f"export.savedmodel writes it, in {path}, received: "
            f"{first_line(e)}; export it again." + export_written_by(path)
        ) from e
    return model, spec


def _from_keras(path):
    try:
        # Keras reads files with other names in formats that may contain code.
        if not (path.endswith(".keras") and zipfile.is_zipfile(path)):
            raise ValueError("not a .keras file")
        model = keras.models.load_model(path, compile=False)
        for name in (NORMALISE, FEATURES, PROJECTION):
            model.get_layer(name)
        for layer in model.layers:
            if isinstance(layer, keras.Model):  # not a ResNet
                backbones.name_variables(layer)
    # The type of the exception depends on the damage.
    except Exception as e:
        raise UserError(
            f"Expected {_ACCEPTED}, received {path}, which cannot be read: "
            f"{first_line(e)}; check the path or write the file again."
            + export_written_by(path)
        ) from e
    return model
