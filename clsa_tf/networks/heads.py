"""Projection heads and predictors of all methods."""

import dataclasses

from tensorflow import keras

from clsa_tf.networks.backbones.resnet import layer_seed
from clsa_tf.networks.batchnorm import batch_norm


def _torch_uniform(fan_in, seed):
    """Uniform within 1/sqrt(fan in): torch's default of weights and biases."""
    return keras.initializers.RandomUniform(-(fan_in**-0.5), fan_in**-0.5, seed)


def _haiku_normal(fan_in, seed):
    return keras.initializers.TruncatedNormal(stddev=fan_in**-0.5, seed=seed)


def _small_normal(fan_in, seed):
    del fan_in
    return keras.initializers.RandomNormal(stddev=0.01, seed=seed)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How the layers of one method's heads are built.

    Attributes:
        biases: whether (hidden, last) layers have a bias.
        hidden_norm: whether hidden layers are normalised over the batch.
        last_norm: "" for no normalisation of the last layer; otherwise its
            learned part, "scale" or "nothing".
        weights: function, (fan in, seed) -> initializer of the weights.
        zero_biases: whether biases start at 0; otherwise as the weights.
    """

    biases: tuple
    hidden_norm: bool
    last_norm: str
    weights: object
    zero_biases: bool = True


KINDS = {
    # MoCo v1 (one layer) and v2, CLSA: facebookresearch/moco@7397dfe.
    "plain": _Kind((True, True), False, "", _torch_uniform, zero_biases=False),
    # google-research/simclr, tf2/model.py.
    "simclr": _Kind((False, False), True, "scale", _small_normal),
    # google-deepmind/deepmind-research, byol/utils/networks.py, except its
    # hidden bias, which the normalisation after it cancels.
    "byol": _Kind((False, False), True, "", _haiku_normal),
    # JegZheng/CACR-SSL, imagenet_pretraining, after facebookresearch/moco-v3:
    # projection head of its ResNet-50, and predictor.
    "mocov3": _Kind((False, False), True, "nothing", _torch_uniform),
    "mocov3_predictor": _Kind((False, False), True, "", _torch_uniform),
}


@dataclasses.dataclass(frozen=True)
class Head:
    """Description of a head, for `build`.

    Attributes:
        kind: one of `KINDS`.
        layers: number of linear layers, at least 1; a ReLU follows each except
            the last.
        hidden: width of all layers except the last; 0: width of the input.
        outputs: `D`, width of the last layer.
    """

    kind: str = "plain"
    layers: int = 2
    hidden: int = 0
    outputs: int = 128


PLAIN = Head()


def build(head, features, *, bn_kind="local", bn_splits=1, seed=0, name="head"):
    """Builds a head.

    Args:
        head: `Head`.
        features: `F`, width of its input.
        bn_kind: see `clsa_tf.networks.batchnorm`.
        bn_splits: see `clsa_tf.networks.batchnorm`.
        seed: int; with the name and the head it determines the initial weights.
        name: name of the model. Layers are `fc.0` (linear), `fc.1` (ReLU),
            `fc.2`, ... after the prefix of the name, if any: `head1.fc.0` in
            "head1/head".

    Returns:
        `keras.Model`: float32 `[N, F]` -> float32 `[N, D]`.
    """
    kind = KINDS[head.kind]
    prefix = name[: name.rfind("/") + 1].replace("/", ".")
    norm = dict(kind=bn_kind, splits=bn_splits)
    x = inputs = keras.Input([features])
    for i in range(head.layers):
        last = i == head.layers - 1
        width = head.outputs if last else head.hidden or features
        linear = f"{prefix}fc.{2 * i}"
        x = _linear(x, width, kind, kind.biases[last], seed, linear)
        learns = kind.last_norm if last else "all" * kind.hidden_norm
        if learns:
            x = _normalised(x, learns, norm, linear)
        if not last:
            x = keras.layers.ReLU(name=f"{prefix}fc.{2 * i + 1}")(x)
    return keras.Model(inputs, x, name=name.replace("/", "."))


def hidden(model):
    """The output of a head's first ReLU, a symbolic tensor."""
    relus = [x for x in model.layers if isinstance(x, keras.layers.ReLU)]
    return relus[0].output


def _linear(x, width, kind, bias, seed, name):
    fan_in = x.shape[-1]

    def initial(part):
        return kind.weights(fan_in, layer_seed(seed, name + part))

    return keras.layers.Dense(
        width,
        use_bias=bias,
        kernel_initializer=initial("kernel"),
        bias_initializer="zeros" if kind.zero_biases else initial("bias"),
        name=name,
    )(x)


def _normalised(x, learns, norm, linear):
    """Normalises rows as images of one pixel, so kernels are the backbone's."""
    width = x.shape[-1]
    x = keras.layers.Reshape([1, 1, width], name=f"{linear}.pixel")(x)
    x = batch_norm(
        **norm,
        center=learns == "all",
        scale=learns != "nothing",
        name=f"{linear}.bn",
    )(x)
    return keras.layers.Reshape([width], name=f"{linear}.row")(x)
