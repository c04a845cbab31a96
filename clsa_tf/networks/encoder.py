"""The encoder: normalisation of images, backbone and projection head."""

import tensorflow as tf
from tensorflow import keras

from clsa_tf.networks import backbones
from clsa_tf.networks.backbones import NAME
from clsa_tf.networks.batchnorm import splits_on_replica
from clsa_tf.networks.heads import PLAIN, build, hidden

# Mean and standard deviation of ImageNet's RGB values in [0, 1]; torchvision's.
MEAN = (0.485, 0.456, 0.406)
STDDEV = (0.229, 0.224, 0.225)


def normalise(images):
    """Scales images to zero mean and unit variance over ImageNet.

    Args:
        images: uint8 `[N, H, W, 3]` in 0..255, or float in [0, 1].

    Returns:
        float32 `[N, H, W, 3]`.
    """
    if images.dtype == tf.uint8:
        images = tf.cast(images, tf.float32) / 255.0
    return (tf.cast(images, tf.float32) - MEAN) / STDDEV


class Encoder(keras.Model):
    """Images to features, and features to unit projections.

    Args:
        backbone: name, see `clsa_tf.networks.backbones.build`.
        width: factor on the backbone's channels.
        stem: one of `clsa_tf.networks.backbones.resnet.STEMS`.
        head: `clsa_tf.networks.heads.Head`, the same for all heads.
        heads: `H`, number of parallel heads on the backbone.
        concatenate: whether the features are the concatenated hidden layers of
            all heads (LooC++) instead of the backbone's output.
        bn_kind: see `clsa_tf.networks.batchnorm`.
        bn_splits: see `clsa_tf.networks.batchnorm`.
        seed: int, determines the initial weights.
        precision: Keras policy of the backbone, such as `"mixed_bfloat16"`.
        name: name of the model.

    Attributes:
        backbone: `keras.Model`, normalised images -> `[N, F]`.
        heads: list of `keras.Model`, `[N, F]` -> projections `[N, D]`.
        features: width of the features.
        projections: width of the result of `project`, `H D`.
    """

    def __init__(
        self,
        *,
        backbone="resnet50",
        width=1.0,
        stem="imagenet",
        head=PLAIN,
        heads=1,
        concatenate=False,
        bn_kind="local",
        bn_splits=1,
        seed=0,
        precision="float32",
        name="encoder",
    ):
        """See the class."""
        super().__init__(name=name)
        norm = dict(bn_kind=bn_kind, bn_splits=bn_splits)
        self.backbone = backbones.build(
            backbone,
            width=width,
            stem=stem,
            seed=seed,
            precision=precision,
            **norm,
        )
        self.heads = make_heads(
            head, heads, self.backbone.output_shape[-1], seed=seed, **norm
        )
        self.features = self.backbone.output_shape[-1]
        self._hidden = []
        if concatenate:
            self._hidden = [keras.Model(x.input, hidden(x)) for x in self.heads]
            self.features = sum(x.output_shape[-1] for x in self._hidden)
        self.projections = heads * head.outputs

    def call(self, images, training=False):
        """Features float32 `[N, features]` of images (see `normalise`)."""
        return self._features(self._trunk(images, training), training)

    def project(self, images, training=False):
        """Projections float32 `[N, H D]`, unit rows, of images."""
        return self._projections(self._trunk(images, training), training)

    def features_and_projections(self, images, training=False):
        """Features and projections of images, from one pass."""
        trunk = self._trunk(images, training)
        return (
            self._features(trunk, training),
            self._projections(trunk, training),
        )

    def project_heads(self, images, training=False):
        """Projections float32 `[N, H, D]`, each a unit vector, of images."""
        trunk = self._trunk(images, training)
        rows = [head(trunk, training=training) for head in self.heads]
        return unit(tf.stack(rows, axis=1))

    def _trunk(self, images, training):
        return self.backbone(normalise(images), training=training)

    def _features(self, trunk, training):
        if not self._hidden:
            return trunk
        parts = [part(trunk, training=training) for part in self._hidden]
        return tf.concat(parts, axis=-1)

    def _projections(self, trunk, training):
        # Each head gives unit rows: cosines of the whole are means over heads.
        rows = [unit(head(trunk, training=training)) for head in self.heads]
        return rows[0] if len(rows) == 1 else unit(tf.concat(rows, axis=-1))


def make_encoder(config, *, name, precision="float32"):
    """Returns the `Encoder` that `config` describes.

    Args:
        config: `clsa_tf.config.Config`.
        name: name of the model; does not change its initial weights.
        precision: Keras policy of its convolutions, see
            `clsa_tf.networks.precision`; variables are always float32.
    """
    options = config.options
    return Encoder(
        backbone=config.backbone,
        width=config.width,
        stem=config.stem,
        head=options.head,
        heads=options.heads,
        concatenate=options.concatenate,
        bn_kind=config.batch_norm,
        bn_splits=splits_on_replica(config),
        seed=config.seed,
        precision=precision,
        name=name,
    )


def make_heads(head, count, features, *, seed=0, **norm):
    """Builds the heads of an encoder.

    Args:
        head: `clsa_tf.networks.heads.Head`.
        count: number of heads; each has different initial weights.
        features: `F`, width of their input.
        seed: see `clsa_tf.networks.heads.build`.
        **norm: `bn_kind` and `bn_splits`, see `clsa_tf.networks.heads.build`.

    Returns:
        list of `keras.Model`, float32 `[N, F]` -> float32 `[N, D]`.
    """
    names = ["head"] + [f"head{i}/head" for i in range(1, count)]
    return [build(head, features, seed=seed, name=n, **norm) for n in names]


def copy_variables(source, target):
    """Copies the values of all variables from one network to another.

    Under a strategy with several workers, all of them must call it, because
    reading running statistics averages them over the replicas.

    Args:
        source: `keras.Model`.
        target: `keras.Model` with the same variables.
    """
    for variable, value in zip(target.variables, source.variables):
        variable.assign(value)


def weight_name(variable):
    """Name of an encoder's variable in exports and digests."""
    return getattr(variable, NAME, None) or variable.name.split(":")[0]


def unit(rows):
    """Divides each row of float `[N, D]` by its length, at least in float32."""
    rows = rows if rows.dtype == tf.float64 else tf.cast(rows, tf.float32)
    # The squared length is floored at 1e-24: torch's floor of 1e-12 on the
    # length.
    return tf.math.l2_normalize(rows, axis=-1, epsilon=1e-24)
