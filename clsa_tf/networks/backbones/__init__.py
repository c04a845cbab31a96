"""Backbones by name: the registry `BACKBONES`, and backbones of two libraries.

To add a backbone, write its function in a file of this folder, and add its name
and the function to `BACKBONES`:

    def function(*, width, stem, bn_kind, bn_splits, seed, precision):

It gets all settings of `build` and returns a functional `keras.Model` from
normalised images float32 `[N, H, W, 3]`, of any size, to features float32
`[N, F]`. It may ignore settings, and layers may have any name:

* `clsa_tf.networks.batchnorm.batch_norm` makes the normalisation layers for
  `bn_kind` and `bn_splits`. Those of Keras are "local".
* If it ignores `seed`, each run starts with other weights.
* A layer class that is not one of Keras has to be registered with
  `keras.saving.register_keras_serializable`; otherwise `.keras` files of the
  encoder cannot be loaded.
"""

import functools

import tensorflow as tf
from tensorflow import keras

from clsa_tf.errors import UserError
from clsa_tf.networks.backbones import libraries, resnet

# Name -> function that takes the settings of `build` and returns the backbone.
BACKBONES = {
    name: functools.partial(resnet.resnet, name) for name in resnet.BLOCKS
}
# Name of a backbone's model, and of the layer that it becomes in an encoder.
LAYER = "backbone"
# Attribute of variables with a name that is the same in every build.
NAME = "_clsa_tf_name"


def problem(name):
    """Returns a message if the name of a backbone is invalid, otherwise ""."""
    if name in BACKBONES or libraries.split(name):
        return libraries.problem(name) if libraries.split(name) else ""
    return f"Expected one of {known()}, received {name!r}"


def known():
    """Returns the valid names of backbones, as text."""
    prefixes = " or ".join(f"{prefix}:NAME" for prefix in libraries.LIBRARIES)
    return f"{', '.join(BACKBONES)}, or {prefixes}"


def build(
    name,
    *,
    width=1.0,
    stem="imagenet",
    bn_kind="local",
    bn_splits=1,
    seed=0,
    precision="float32",
):
    """Builds a backbone.

    Args:
        name: a key of `BACKBONES`, or a library's backbone such as
            `"keras_applications:MobileNetV2"` or `"keras_cv:DenseNet121"`.
        width: factor on all channels; must be 1 for a library's backbone.
        stem: one of `clsa_tf.networks.backbones.resnet.STEMS`; must be
            `"imagenet"` for a library's backbone.
        bn_kind: see `clsa_tf.networks.batchnorm.batch_norm`.
        bn_splits: see `clsa_tf.networks.batchnorm.batch_norm`.
        seed: int, determines the initial weights.
        precision: Keras policy of the layers; features are always float32.

    Returns:
        `keras.Model`: float32 `[N, H, W, 3]` (normalised) -> float32 `[N, F]`.
        Except for `has_torchvision_names`, its variables are named by their
        order.

    Raises:
        UserError: the backbone cannot be built with these settings.
    """
    make = BACKBONES.get(name) or functools.partial(libraries.build, name)
    model = make(
        width=width,
        stem=stem,
        bn_kind=bn_kind,
        bn_splits=bn_splits,
        seed=seed,
        precision=precision,
    )
    if has_torchvision_names(name):
        return model
    _check_output(name, model)
    features = keras.layers.Activation("linear", dtype="float32")(model.output)
    model = keras.Model(model.input, features, name=LAYER)
    name_variables(model)
    return model


def has_torchvision_names(name):
    """Whether a backbone is a ResNet of `resnet`.

    Its layers and variables have the same names in every build. Those of other
    backbones are named by Keras, which counts layers per process.
    """
    make = BACKBONES.get(name)
    return isinstance(make, functools.partial) and make.func is resnet.resnet


def name_variables(model):
    """Names the variables of a backbone by their order."""
    for number, variable in enumerate(model.variables):
        setattr(variable, NAME, f"backbone/{number:04d}")


def _check_output(name, model):
    # A model that is not functional has no output.
    output = getattr(model, "output", None)
    if getattr(output, "shape", tf.TensorShape(None)).rank != 2:
        raise UserError(
            f"Expected a functional keras.Model with features [N, F] from the "
            f"function of --backbone={name}, received "
            f"{type(model).__name__} with {getattr(output, 'shape', output)}; "
            "see clsa_tf/networks/backbones/__init__.py."
        )


def check_sizes(name, sizes):
    """Checks that a backbone can encode images of several sizes.

    Args:
        name: see `build`.
        sizes: iterable of int, sides of square images in px.

    Raises:
        UserError: a size is invalid for a library's backbone. Backbones in
            `BACKBONES` have to accept all sizes.
    """
    if name not in BACKBONES:
        libraries.check_sizes(name, sizes)
