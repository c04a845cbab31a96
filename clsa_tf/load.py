"""Encoders for other work: a Keras model from whatever holds the weights.

`clsa_tf.load_encoder(DIR)` is what users call; `functional` is the same
network as `clsa_tf.networks.encoder.Encoder`, made of Keras' own layers only.
"""

import dataclasses
import json
import os
import re
import zipfile

import tensorflow as tf
from tensorflow import keras

from clsa_tf import config as config_lib
from clsa_tf.checkpoint import load_trained
from clsa_tf.errors import UserError, first_line
from clsa_tf.files import MODEL_CARD, newest_savedmodel
from clsa_tf.networks.encoder import MEAN, STDDEV, make_heads, weight_name
from clsa_tf.networks.heads import KINDS, PLAIN, Head, hidden
from clsa_tf.networks.resnet import BLOCKS, STEMS, resnet

# What images are to every model that is written to a file. Its input says so:
# see `input_name`.
PIXELS = (0, 255)
# Names of layers; those between the first two are torchvision's.
NORMALISE, FEATURES, PROJECTION = "normalise", "avgpool", "projection"
# Behind the heads' hidden layers, where these are the features.
HIDDEN = "hidden"
# What export.formats calls its file.
KERAS_FILE = "encoder.keras"
# What it writes beside: what is known of each file.
FORMATS = "formats.json"
OUTPUTS = ("embedding", "projection", "both")

_ACCEPTED = (
    "the directory of a run, of an exported version or of the versions, or "
    f"the file {KERAS_FILE}"
)


def load_encoder(
    path,
    *,
    outputs="embedding",
    head_layers=0,
    pixels=PIXELS,
    trainable=True,
    name="encoder",
):
    """Loads a pretrained encoder as a `keras.Model`, ready to fine-tune.

        encoder = clsa_tf.load_encoder("runs/quickstart")
        model = keras.Sequential([encoder, keras.layers.Dense(10)])

    **Pixels are 0..255 by default**, uint8 or float: as
    `keras.utils.image_dataset_from_directory`, `keras.utils.load_img` and
    tensorflow-datasets give them. Pass `pixels=(0, 1)` for images that were
    divided by 255. The model normalises them itself; nothing else has to be
    done. The name of its input says which it takes, such as `images_0_255`. To
    check: `encoder.get_layer("normalise")(images)` of photographs has
    a standard deviation of about 1; with the wrong range it is near 0 or in
    the hundreds.

    The model consists of Keras' own layers, so that what is built on it is
    saved by `model.save("model.keras")` and loaded without clsa_tf. Its layers
    are not nested: `encoder.get_layer("layer2.1.relu").output` is the feature
    map of a block, see `stages`.

    Args:
        path: the directory of a run (its newest checkpoint), of an exported
            version, of the versions (the newest), of what `export.formats`
            wrote, or a file `encoder.keras`.
        outputs: `"embedding"`, float32 `[N, F]`, features of the backbone
            (of LooC++: the hidden layers of its heads, side by side);
            `"projection"`, float32 `[N, D]`, unit rows; or `"both"`, a
            dictionary of the two.
        head_layers: hidden layers of the projection head that the embedding
            goes through. 0 is usual; SimCLR v2 fine-tunes from the first one
            of three layers (`ft_proj_selector` of google-research/simclr).
        pixels: (black, white), the values that stand for them.
        trainable: whether training changes the weights. If not, its batch
            normalisation keeps to the running statistics, too.
        name: of the model.

    Returns:
        functional `keras.Model`: images `[N, H, W, 3]`, RGB, of any size, to
        what `outputs` says.

    Raises:
        UserError: nothing that can be loaded there, or it is damaged.
    """
    if outputs not in OUTPUTS:
        raise UserError(
            f"Expected outputs to be one of {', '.join(OUTPUTS)}, received "
            f"{outputs!r}; choose one of them."
        )
    name_of_input = input_name(pixels)
    model, _ = read(os.path.expanduser(os.fspath(path)))
    if model.input_names != [name_of_input]:
        model = _with_input(model, name_of_input)
    features = _features(model, head_layers)
    normalise = model.get_layer(NORMALISE)
    # Whatever a file has: those of earlier versions took 0..1.
    normalise.scale, normalise.offset = _affine(pixels)
    tensors = {
        "embedding": features,
        "projection": model.get_layer(PROJECTION).output,
    }
    encoder = keras.Model(
        model.input,
        tensors if outputs == "both" else tensors[outputs],
        name=name,
    )
    encoder.trainable = trainable
    return encoder


def image_size(path):
    """The size of the images that an encoder was made for.

    It takes images of any size, and is best on about this one.

    Args:
        path: as for `load_encoder`.

    Returns:
        int, side in px: the run's `--image_size`, or that of the export; None
        where it is not written, such as for an `encoder.keras` by itself.

    Raises:
        UserError: the flags of the run cannot be read.
    """
    path = os.path.expanduser(os.fspath(path))
    if os.path.exists(os.path.join(path, config_lib.RUN_FLAGS)):
        return config_lib.load(path).image_size
    if os.path.exists(os.path.join(path, KERAS_FILE)):
        path = os.path.join(path, KERAS_FILE)
    folder, file = os.path.split(path)
    about = os.path.join(folder, FORMATS)
    if not os.path.isfile(path):
        about = os.path.join(newest_savedmodel(path) or path, MODEL_CARD)
    try:
        with open(about, encoding="utf-8") as opened:
            found = json.load(opened)
        size = (found[file] if os.path.isfile(path) else found)["image_size"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return size if isinstance(size, int) and size > 0 else None


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
    trunk = resnet(backbone, width=width, stem=stem)
    images = keras.Input([image_size, image_size, 3], name=input_name(PIXELS))
    scale, offset = _affine(PIXELS)
    x = keras.layers.Rescaling(scale, offset, name=NORMALISE)(images)
    features = _replay(trunk, x)[id(trunk.output)]
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
        dictionary that JSON can hold; see `_functional_of`.
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
    model = _functional_of(architecture(config), image_size=image_size)
    values = {v.name: v for v in encoder.variables}
    for variable in model.variables:
        variable.assign(values[variable.name])
    return model


def _functional_of(spec, **options):
    return functional(**spec | {"head": Head(**spec["head"])}, **options)


def stages(encoder):
    """Layers whose outputs are the feature maps of the four stages.

    Args:
        encoder: what `load_encoder` returned.

    Returns:
        list of four names, finest first, for `encoder.get_layer`. With the
        stem "imagenet" their strides are 4, 8, 16 and 32 px, else 1, 2, 4
        and 8.
    """
    ends = {}
    for layer in encoder.layers:
        match = re.fullmatch(r"layer(\d)\.\d+\.relu", layer.name)
        if match:
            ends[match[1]] = layer.name  # the last block's stays
    return [ends[stage] for stage in sorted(ends)]


def _features(model, head_layers):
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


def _affine(pixels):
    """Scale and offset, per channel, of pixels to normalised images."""
    black, white = map(float, pixels)
    scale = [1 / ((white - black) * s) for s in STDDEV]
    return scale, [-black * k - m / s for k, m, s in zip(scale, MEAN, STDDEV)]


def _with_input(model, name):
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


def read(path):
    """Reads an encoder from any of the places that hold one.

    Args:
        path: see `load_encoder`.

    Returns:
        the model that `functional` describes; and its `architecture`, None
        where it is not recorded.

    Raises:
        UserError: nothing that can be loaded there, or it is damaged.
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
        f"Expected {_ACCEPTED}, received {path!r}, which is "
        f"{'none of them' if os.path.exists(path) else 'not there'}; check "
        "the path."
    )


def _from_export(path):
    """From the variables that `export.model.served` saves by name."""
    try:
        with open(os.path.join(path, MODEL_CARD), encoding="utf-8") as file:
            spec = json.load(file)["encoder"]
        known = spec["backbone"] in BLOCKS and spec["stem"] in STEMS
        if not known or spec["head"]["kind"] not in KINDS:
            raise ValueError(f"unknown architecture {spec}")
        model = _functional_of(spec)
        weights = {weight_name(v): v for v in model.variables}
        reader = tf.train.Checkpoint(weights=weights)
        status = reader.read(os.path.join(path, "variables", "variables"))
        status.expect_partial().assert_existing_objects_matched()
    # What is thrown depends on what is damaged.
    except Exception as e:
        raise UserError(
            f"Expected a model with its {MODEL_CARD} and variables, as "
            f"export.savedmodel writes it, in {path}, received: "
            f"{first_line(e)}; export it again."
        ) from e
    return model, spec


def _from_keras(path):
    try:
        # Keras takes files of other names for formats that may bring code.
        if not (path.endswith(".keras") and zipfile.is_zipfile(path)):
            raise ValueError("not a .keras file")
        model = keras.models.load_model(path, compile=False)
        for name in (NORMALISE, FEATURES, PROJECTION):
            model.get_layer(name)
    # What is thrown depends on what is damaged.
    except Exception as e:
        raise UserError(
            f"Expected {_ACCEPTED}, received {path}, which cannot be read as "
            f"such: {first_line(e)}; check the path or write it again."
        ) from e
    return model
