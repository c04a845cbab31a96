"""Loads pretrained encoders as Keras models: `clsa_tf.load_encoder`.

The models come from `clsa_tf.networks.functional`: the same network as
`clsa_tf.networks.encoder.Encoder`, built of Keras' own layers only.
"""

import json
import os
import re

from tensorflow import keras

from clsa_tf import config as config_lib
from clsa_tf.errors import UserError
from clsa_tf.files import FORMATS, MODEL_CARD, newest_savedmodel
from clsa_tf.networks.backbones import LAYER
from clsa_tf.networks.functional import (
    NORMALISE,
    PIXELS,
    PROJECTION,
    affine,
    feature_tensor,
    input_name,
    with_input,
)
from clsa_tf.training.encoder_files import KERAS_FILE, read

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

    **Pixels are 0..255 by default**, uint8 or float, as returned by
    `keras.utils.image_dataset_from_directory`, `keras.utils.load_img` and
    tensorflow-datasets. Pass `pixels=(0, 1)` for images that were divided by
    255. The model normalises the images itself. The name of its input contains
    the range, as in `images_0_255`. To check the range of your images:
    `encoder.get_layer("normalise")(images)` of photographs has a standard
    deviation of about 1; with the wrong range it is near 0 or in the hundreds.

    The model consists of Keras' own layers. A model that is built on it can be
    saved by `model.save("model.keras")` and loaded without clsa_tf.

    The layers of a ResNet are not nested:
    `encoder.get_layer("layer2.1.relu").output` is the feature map of a block,
    see `stages`. Any other backbone is one layer,
    `encoder.get_layer("backbone")`: a functional model from normalised images
    to features.

    Args:
        path: the directory of a run (loads its newest checkpoint), of an
            exported version, of all versions (loads the newest) or of files
            of `export.formats`, or a file `encoder.keras`.
        outputs: `"embedding"`, float32 `[N, F]`, features of the backbone
            (for LooC++ the concatenated hidden layers of its heads);
            `"projection"`, float32 `[N, D]`, unit rows; or `"both"`, a dict of
            the two.
        head_layers: number of hidden layers of the projection head that are
            applied to the features. 0 is usual; SimCLR v2 fine-tunes from the
            first one of three layers (`ft_proj_selector` of
            google-research/simclr).
        pixels: (black, white), the values of black and white pixels.
        trainable: whether training changes the weights. If not, batch
            normalisation uses the running statistics in training, too.
        name: name of the model.

    Returns:
        functional `keras.Model` from images `[N, H, W, 3]`, RGB, of any size,
        to `outputs`.

    Raises:
        UserError: there is no encoder, or it is damaged.
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
    # Replaces the range of the file, which was 0..1 in earlier versions.
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
    """Returns the size of the images that an encoder was made for.

    The encoder accepts images of any size and is best on about this one.

    Args:
        path: see `load_encoder`.

    Returns:
        int, side in px: `--image_size` of the run or of the export; None if it
        is not recorded, such as for an `encoder.keras` without its
        `formats.json`.

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
    """Names the layers with the feature maps of the four stages.

    Args:
        encoder: model returned by `load_encoder`, whose backbone is a ResNet.

    Returns:
        list of four names for `encoder.get_layer`, finest first. Their strides
        are 4, 8, 16 and 32 px with the stem "imagenet", otherwise 1, 2, 4 and
        8 px.

    Raises:
        UserError: the backbone is not a ResNet. Its layers are those of
            `encoder.get_layer("backbone")`.
    """
    ends = {}
    for layer in encoder.layers:
        match = re.fullmatch(r"layer(\d)\.\d+\.relu", layer.name)
        if match:
            ends[match[1]] = layer.name  # the last block overwrites others
    if not ends:
        raise UserError(
            "Expected an encoder whose backbone is a ResNet, received one "
            "without layers such as layer1.0.relu; choose feature maps of "
            f'encoder.get_layer("{LAYER}") yourself.'
        )
    return [ends[stage] for stage in sorted(ends)]
