"""Encoders for other work: a Keras model from whatever holds the weights.

`clsa_tf.load_encoder(DIR)` is what users call; `functional` is the same
network as `clsa_tf.networks.encoder.Encoder`, made of Keras' own layers only.
"""

import json
import os
import re

from tensorflow import keras

from clsa_tf import config as config_lib
from clsa_tf.errors import UserError
from clsa_tf.files import MODEL_CARD, newest_savedmodel
from clsa_tf.networks.functional import (
    NORMALISE,
    PIXELS,
    PROJECTION,
    affine,
    feature_tensor,
    input_name,
    with_input,
)
from clsa_tf.training.encoder_files import FORMATS, KERAS_FILE, read

OUTPUTS = ("embedding", "projection", "both")


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
        model = with_input(model, name_of_input)
    features = feature_tensor(model, head_layers)
    normalise = model.get_layer(NORMALISE)
    # Whatever a file has: those of earlier versions took 0..1.
    normalise.scale, normalise.offset = affine(pixels)
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
