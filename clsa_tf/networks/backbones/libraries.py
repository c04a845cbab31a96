"""Backbones of keras.applications and KerasCV, with random weights.

`build` returns a functional model in the run's precision and with its kind of
batch normalisation. The seed determines the initial weights. Dropout and
stochastic depth are disabled, because checkpoints do not contain their random
state. Layers that rescale pixels are removed, because encoders normalise images
themselves.
"""

import difflib
import inspect
import warnings

import tensorflow as tf
from tensorflow import keras

from clsa_tf.errors import UserError, first_line
from clsa_tf.networks.backbones.resnet import layer_seed
from clsa_tf.networks.batchnorm import SplitBatchNormalization

LIBRARIES = ("keras_applications", "keras_cv")

# Names of arguments of layers that set a dropout rate, in both libraries.
_RATES = ("rate", "drop_path_rate", "dropout", "dropout_rate", "drop_rate")
_RESCALING = (keras.layers.Rescaling, keras.layers.Normalization)


def _resnets(kind, first):
    """The ResNets of KerasCV, as a dictionary: name -> (class, arguments)."""
    found = {}
    for depth, blocks in (
        (18, [2, 2, 2, 2]),
        (34, [3, 4, 6, 3]),
        (50, [3, 4, 6, 3]),
        (101, [3, 4, 23, 3]),
        (152, [3, 8, 36, 3]),
    ):
        found[f"ResNet{depth}{kind}"] = (
            f"ResNet{kind}Backbone",
            dict(
                stackwise_filters=[64, 128, 256, 512],
                stackwise_blocks=blocks,
                stackwise_strides=[1, 2, 2, 2],
                block_type="basic_block" if depth < 50 else first,
            ),
        )
    return found


# Architectures that KerasCV would otherwise download for a named backbone:
# arXiv 1512.03385, 1603.05027, 1608.06993, 1409.1556.
_SHAPES = {
    **_resnets("", "block"),
    **_resnets("V2", "block"),
    **{
        f"DenseNet{depth}": (
            "DenseNetBackbone",
            dict(stackwise_num_repeats=repeats),
        )
        for depth, repeats in (
            (121, [6, 12, 24, 16]),
            (169, [6, 12, 32, 32]),
            (201, [6, 12, 48, 32]),
        )
    },
    "VGG16": ("VGG16Backbone", dict(include_top=False)),
}


def split(name):
    """Returns (library, name in it) of a backbone; None without a prefix."""
    library, colon, inner = name.partition(":")
    return (library, inner) if colon and library in LIBRARIES else None


def problem(name):
    """Returns a message if a backbone's name is invalid, otherwise ""."""
    library, inner = split(name)
    known = _applications() if library == "keras_applications" else _keras_cv()
    if inner in known:
        return ""
    near = difflib.get_close_matches(inner, known, n=3, cutoff=0.4)
    return (
        f"Expected a backbone of {library} ({', '.join(near or known[:5])}, "
        f"...), received {inner!r}"
    )


def _applications():
    return sorted(
        name
        for name, value in vars(keras.applications).items()
        if inspect.isfunction(value)
        and {"include_top", "weights"} <= {*inspect.signature(value).parameters}
    )


def _keras_cv():
    import keras_cv  # slow to import, rarely needed

    suffix = "Backbone"
    classes = {
        name.removesuffix(suffix)
        for name in dir(keras_cv.models)
        if name.endswith(suffix)
    }
    return sorted({*_SHAPES, *classes} - {""})


def build(name, *, width, stem, bn_kind, bn_splits, seed, precision):
    """Builds a library's backbone; see `clsa_tf.networks.backbones.build`.

    Raises:
        UserError: the library cannot build it for images of any size, or
            `width` or `stem` is set, which are for ResNets only.
    """
    if width != 1 or stem != "imagenet":
        raise UserError(
            f"Expected --width=1 and --stem=imagenet with --backbone={name}, "
            f"received --width={width:g} and --stem={stem}; omit both."
        )
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(precision)
    try:
        with warnings.catch_warnings():
            # Keras warns about initializers without a seed; `_seed` replaces
            # their values.
            warnings.simplefilter("ignore", UserWarning)
            model = _replace(_made(name), name, bn_kind, bn_splits)
            _seed(model, seed)
    finally:
        keras.mixed_precision.set_global_policy(before)
    x = model.output
    if x.shape.rank == 4:
        x = keras.layers.GlobalAveragePooling2D(dtype="float32")(x)
    return keras.Model(model.input, x)


def check_sizes(name, sizes):
    """Checks that a backbone can encode images; see `backbones.check_sizes`.

    Some architectures fail for small images, or for sizes that their strides do
    not divide. TensorFlow would report this in the first training step.
    """
    with tf.device("CPU:0"):
        model = _made(name)
    invalid = [size for size in sorted(set(sizes)) if not _accepts(model, size)]
    if invalid:
        listed = ", ".join(map(str, invalid))
        raise UserError(
            f"Expected crops and --image_size that --backbone={name} can "
            f"encode, received {listed} px; use other sizes, usually larger "
            "ones, or another --backbone."
        )


def _accepts(model, size):
    """Whether a model's output for images of `size` px exists, not empty."""
    try:
        outputs = model(keras.Input([size, size, 3]), training=False)
    except Exception:  # any type, depending on the library's layers
        return False
    return 0 not in outputs.shape.as_list()


def _made(name):
    """Builds the library's model, `[N, H, W, 3]` -> feature map or vector."""
    library, inner = split(name)
    try:
        if library == "keras_applications":
            make = getattr(keras.applications, inner)
            options = {"include_preprocessing": False}
            known = inspect.signature(make).parameters
            model = make(
                include_top=False,
                weights=None,
                input_shape=(None, None, 3),
                **{k: v for k, v in options.items() if k in known},
            )
        else:
            import keras_cv

            kind, arguments = _SHAPES.get(inner, (f"{inner}Backbone", {}))
            make = getattr(keras_cv.models, kind)
            model = make(include_rescaling=False, **arguments)
    except Exception as e:  # any type, depending on the library
        raise UserError(
            f"Cannot build {inner} of {library} for images of any size: "
            f"{first_line(e)}; choose another --backbone."
        ) from e
    rank = getattr(model.output, "shape", tf.TensorShape(None)).rank
    if rank not in (2, 4):
        raise UserError(
            f"Expected a backbone whose output is a feature map or a vector, "
            f"received {name} with {model.output_shape}; choose another "
            "--backbone."
        )
    return model


def _replace(model, name, bn_kind, bn_splits):
    """Copies a model without dropout and rescaling, with our batch norm."""

    def copy(layer):
        config = layer.get_config()
        if isinstance(layer, (keras.layers.Dropout, *_RESCALING)):
            return keras.layers.Activation("linear", name=layer.name)
        if isinstance(layer, keras.layers.BatchNormalization):
            return _normalisation(layer, config, bn_kind, bn_splits)
        dropping = {key: 0.0 for key in _RATES if key in config}
        return type(layer).from_config(config | dropping)

    if bn_kind != "local":
        inner = [
            layer
            for layer in model.submodules
            if isinstance(layer, keras.layers.BatchNormalization)
            and layer not in model.layers
        ]
        if inner:
            raise UserError(
                f"Expected --batch_norm=local with --backbone={name}, whose "
                "batch normalisation is nested in other layers, received "
                f"--batch_norm={bn_kind}; set --batch_norm=local or choose "
                "another --backbone."
            )
    return keras.models.clone_model(model, clone_function=copy)


def _normalisation(layer, config, kind, splits):
    if kind == "local":
        return type(layer).from_config(config)
    if kind == "split":
        return SplitBatchNormalization(splits, **config)
    return keras.layers.BatchNormalization(**config | {"synchronized": True})


def _seed(model, seed):
    """Sets all initial values, from the seed and each variable's position."""
    layers = [x for x in model.submodules if isinstance(x, keras.layers.Layer)]
    done = set()
    for number, layer in enumerate(layers):
        holds_others = any(
            isinstance(x, keras.layers.Layer) for x in layer.submodules
        )
        if holds_others or not layer.weights:
            continue
        # None if another layer called its `build`.
        built = layer.get_build_config() or {}
        if "input_shape" not in built:
            continue
        config = _seeded(
            layer.get_config(), f"{seed}/{number}/{type(layer).__name__}"
        )
        twin = type(layer).from_config(config)
        twin.build(built["input_shape"])
        layer.set_weights(twin.get_weights())
        done |= {v.ref() for v in layer.weights}
    for number, variable in enumerate(model.trainable_variables):
        if variable.ref() not in done and variable.shape.rank > 1:
            # The layer was left out above: the initializer is unknown.
            initial = keras.initializers.TruncatedNormal(
                0.02, seed=layer_seed(seed, f"variable {number}")
            )
            variable.assign(initial(variable.shape, variable.dtype))


def _seeded(config, place):
    """A layer's configuration with a seed in each initializer."""
    if isinstance(config, dict):
        found = {k: _seeded(v, f"{place}/{k}") for k, v in config.items()}
        if "seed" in found and found["seed"] is None:
            found["seed"] = layer_seed(0, place)
        return found
    return config
