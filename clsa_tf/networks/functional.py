"""The encoder as one functional model of Keras' own layers."""

import dataclasses
import re

import tensorflow as tf
from tensorflow import keras

from clsa_tf.errors import UserError
from clsa_tf.networks import backbones
from clsa_tf.networks.encoder import MEAN, STDDEV, make_heads, weight_name
from clsa_tf.networks.heads import PLAIN, Head, hidden

# What images are to every model that is written to a file. Its input says so:
# see `input_name`.
PIXELS = (0, 255)


# Names of layers; those between the first two are torchvision's.
NORMALISE, FEATURES, PROJECTION = "normalise", "avgpool", "projection"


# Behind the heads' hidden layers, where these are the features.
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
    """Builds the encoder of Keras' own layers, with initial weights.

    Args:
        backbone: see `clsa_tf.networks.encoder.Encoder`.
        width: likewise.
        stem: likewise.
        head: likewise.
        heads: likewise.
        concatenate: likewise.
        image_size: side of the images in px; None: any.

    Returns:
        `keras.Model`: `images_0_255` float32 `[N, H, W, 3]` in [0, 255] ->
        dictionary of `embedding` float32 `[N, F]` and `projection` float32
        `[N, D]`, unit rows. Its variables have the names of the `Encoder`'s.
    """
    trunk = backbones.build(backbone, width=width, stem=stem)
    images = keras.Input([image_size, image_size, 3], name=input_name(PIXELS))
    scale, offset = affine(PIXELS)
    x = keras.layers.Rescaling(scale, offset, name=NORMALISE)(images)
    if backbone in backbones.BACKBONES:
        features = _replay(trunk, x)[id(trunk.output)]
    else:  # one layer of the model, whatever it is made of
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
    """What `functional` has to be told to build the encoder of a run.

    Args:
        config: `clsa_tf.config.Config`.

    Returns:
        dictionary that JSON can hold; see `functional_of`.
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
        config: `clsa_tf.config.Config` that it was made from.
        image_size: see `functional`.
    """
    model = functional_of(architecture(config), image_size=image_size)
    values = {weight_name(v): v for v in encoder.variables}
    for variable in model.variables:
        variable.assign(values[weight_name(variable)])
    return model


def functional_of(spec, **options):
    """Returns `functional` of what `architecture` returned."""
    return functional(**spec | {"head": Head(**spec["head"])}, **options)


def feature_tensor(model, head_layers):
    """The tensor that is the embedding."""
    names = [layer.name for layer in model.layers]
    if not head_layers:
        return model.get_layer(HIDDEN if HIDDEN in names else FEATURES).output
    # Linear layers are fc.0, fc.2, ..., each but the last with a ReLU.
    name = f"fc.{2 * head_layers - 1}"
    if name not in names:
        relus = [x for x in names if re.fullmatch(r"fc\.\d*[13579]", x)]
        raise UserError(
            f"Expected 0 to {len(relus)} hidden layers of this encoder's head, "
            f"received head_layers={head_layers}; choose fewer."
        )
    return model.get_layer(name).output


def input_name(pixels):
    """What the input of a model is called: `images_0_255` of (0, 255).

    Args:
        pixels: (black, white), the values that stand for them.

    Raises:
        UserError: they are the same.
    """
    black, white = map(float, pixels)
    if black == white:
        raise UserError(
            f"Expected the pixel values of black and of white, received "
            f"{pixels}; pass (0, 255) or (0, 1)."
        )
    return f"images_{black:g}_{white:g}"


def affine(pixels):
    """Scale and offset, per channel, of pixels to normalised images."""
    black, white = map(float, pixels)
    scale = [1 / ((white - black) * s) for s in STDDEV]
    return scale, [-black * k - m / s for k, m, s in zip(scale, MEAN, STDDEV)]


def with_input(model, name):
    """A copy of what `functional` returned, with another name of its input."""
    images = keras.Input(model.input.shape[1:], name=name)
    tensors = _replay(model, images)
    outputs = {key: tensors[id(x)] for key, x in model.output.items()}
    copy = keras.Model(images, outputs, name=model.name)
    copy.set_weights(model.get_weights())
    return copy


def _replay(model, x):
    """Applies copies of a functional model's layers to `x`, one by one.

    Calling the model would nest it, out of reach of what picks layers.

    Returns:
        dictionary, id of a tensor of `model` -> its counterpart.
    """
    tensors = {id(model.input): x}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        inputs = [tensors[id(t)] for t in tf.nest.flatten(layer.input)]
        copy = type(layer).from_config(layer.get_config())
        tensors[id(layer.output)] = copy(
            inputs if len(inputs) > 1 else inputs[0]
        )
    return tensors
