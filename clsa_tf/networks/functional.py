"""The encoder as one functional model that consists of Keras' own layers."""

import dataclasses
import re

import tensorflow as tf
from tensorflow import keras

from clsa_tf.errors import UserError
from clsa_tf.networks import backbones
from clsa_tf.networks.encoder import MEAN, STDDEV, make_heads, weight_name
from clsa_tf.networks.heads import PLAIN, Head, hidden

# Values of black and white pixels in all exported models; the name of the input
# contains them, see `input_name`.
PIXELS = (0, 255)


# Names of layers. Between the first two are the layers of a ResNet, with
# torchvision's names, or one layer, `backbones.LAYER`.
NORMALISE, FEATURES, PROJECTION = "normalise", "avgpool", "projection"


# Layer that concatenates the heads' hidden layers, if these are the features.
HIDDEN = "hidden"


def functional(
    *,
    backbone,
    width,
    stem,
    head=PLAIN,
    heads=1,
    concatenate=False,
    image_size=None,
):
    """Builds the encoder from Keras' own layers, with initial weights.

    Args:
        backbone: see `clsa_tf.networks.encoder.Encoder`.
        width: see `Encoder`.
        stem: see `Encoder`.
        head: see `Encoder`.
        heads: see `Encoder`.
        concatenate: see `Encoder`.
        image_size: side of the images in px; None: any.

    Returns:
        `keras.Model`: `images_0_255` float32 `[N, H, W, 3]` in [0, 255] ->
        dictionary of `embedding` float32 `[N, F]` and `projection` float32
        `[N, D]`, unit rows. Its variables have the same names as those of the
        `Encoder`.
    """
    trunk = backbones.build(backbone, width=width, stem=stem)
    images = keras.Input([image_size, image_size, 3], name=input_name(PIXELS))
    scale, offset = affine(PIXELS)
    x = keras.layers.Rescaling(scale, offset, name=NORMALISE)(images)
    if backbones.has_torchvision_names(backbone):
        features = _replay(trunk, x)[id(trunk.output)]
    else:  # the backbone becomes one layer
        features = keras.layers.Activation("linear", name=FEATURES)(trunk(x))
    parts, rows = [], []
    for model in make_heads(head, heads, features.shape[-1]):
        tensors = _replay(model, features)
        if concatenate:
            parts.append(tensors[id(hidden(model))])
        rows.append(tensors[id(model.output)])
    if concatenate:
        features = keras.layers.Concatenate(name=HIDDEN)(parts)
    if heads > 1:
        rows = [
            keras.layers.UnitNormalization(name=f"unit{i}")(x)
            for i, x in enumerate(rows)
        ]
        rows = [keras.layers.Concatenate(name="heads")(rows)]
    projection = keras.layers.UnitNormalization(name=PROJECTION)(rows[0])
    return keras.Model(
        images,
        {"embedding": features, "projection": projection},
        name="encoder",
    )


def architecture(config):
    """Returns the arguments of `functional` for the encoder of a run.

    Args:
        config: `clsa_tf.config.Config`.

    Returns:
        dictionary that can be stored as JSON; see `functional_of`.
    """
    options = config.options
    return {
        "backbone": config.backbone,
        "width": config.width,
        "stem": config.stem,
        "head": dataclasses.asdict(options.head),
        "heads": options.heads,
        "concatenate": options.concatenate,
    }


def from_encoder(encoder, config, *, image_size=None):
    """Returns `functional` with the weights of an `Encoder`.

    Args:
        encoder: `clsa_tf.networks.encoder.Encoder`.
        config: `clsa_tf.config.Config` that the encoder was made from.
        image_size: see `functional`.
    """
    model = functional_of(architecture(config), image_size=image_size)
    values = {weight_name(v): v for v in encoder.variables}
    for variable in model.variables:
        variable.assign(values[weight_name(variable)])
    return model


def functional_of(spec, **options):
    """Builds the `functional` model of an `architecture`."""
    return functional(**spec | {"head": Head(**spec["head"])}, **options)


def feature_tensor(model, head_layers):
    """Returns the symbolic tensor to serve as the embedding.

    Args:
        model: result of `functional`.
        head_layers: number of hidden layers of the head to include; 0: the
            features.

    Raises:
        UserError: the head has fewer hidden layers.
    """
    names = [layer.name for layer in model.layers]
    if not head_layers:
        return model.get_layer(HIDDEN if HIDDEN in names else FEATURES).output
    # fc.0, fc.2, ... are linear layers; ReLUs follow all except the last.
    name = f"fc.{2 * head_layers - 1}"
    if name not in names:
        relus = [x for x in names if re.fullmatch(r"fc\.\d*[13579]", x)]
        raise UserError(
            f"Expected 0 to {len(relus)} hidden layers of this encoder's head, "
            f"received head_layers={head_layers}; use a smaller number."
        )
    return model.get_layer(name).output


def input_name(pixels):
    """Returns the name of a model's input, `images_0_255` for (0, 255).

    Args:
        pixels: pixel values of (black, white).

    Raises:
        UserError: both values are equal.
    """
    black, white = map(float, pixels)
    if black == white:
        raise UserError(
            f"Expected different pixel values of black and white, received "
            f"{pixels}; pass (0, 255) or (0, 1)."
        )
    return f"images_{black:g}_{white:g}"


def affine(pixels):
    """Returns scale and offset, per channel, that normalise pixels."""
    black, white = map(float, pixels)
    scale = [1 / ((white - black) * s) for s in STDDEV]
    return scale, [-black * k - m / s for k, m, s in zip(scale, MEAN, STDDEV)]


def with_input(model, name):
    """Returns a copy of a `functional` model with another name of its input."""
    images = keras.Input(model.input.shape[1:], name=name)
    tensors = _replay(model, images)
    outputs = {key: tensors[id(x)] for key, x in model.output.items()}
    copy = keras.Model(images, outputs, name=model.name)
    copy.set_weights(model.get_weights())
    return copy


def _replay(model, x):
    """Applies copies of a functional model's layers to `x`, one by one.

    Calling the model would nest it in one layer, where other code cannot select
    its layers by name.

    Returns:
        dictionary, id of a tensor of `model` -> the tensor of the copy.
    """
    tensors = {id(model.input): x}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        # `input` and `output` of a backbone that is one layer are its own.
        before, after = layer.get_input_at(0), layer.get_output_at(0)
        inputs = [tensors[id(t)] for t in tf.nest.flatten(before)]
        copy = type(layer).from_config(layer.get_config())
        tensors[id(after)] = copy(inputs if len(inputs) > 1 else inputs[0])
    return tensors
