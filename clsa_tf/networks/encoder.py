"""The encoder: normalise, backbone, projection head. It is what is exported."""

import tensorflow as tf
from tensorflow import keras

from clsa_tf.networks.resnet import layer_seed, resnet

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


def mlp(features, *, hidden, outputs, seed):
    """Projection head: linear, ReLU, linear, both with bias, no normalisation.

    Args:
        features: `F`, width of its input.
        hidden: width of the hidden layer.
        outputs: `D`, width of the projection.
        seed: int; same seed, same initial weights.

    Returns:
        `keras.Model`: float32 `[N, F]` -> float32 `[N, D]`. Initial weights and
        biases are uniform within 1/sqrt(fan in), torch's default.

    Source: MoCo v2 (arXiv 2003.04297), used by CLSA unchanged.
    """

    def linear(fan_in, width, name):
        def uniform(part):
            return keras.initializers.RandomUniform(
                -(fan_in**-0.5), fan_in**-0.5, layer_seed(seed, name + part)
            )

        return keras.layers.Dense(
            width,
            kernel_initializer=uniform("kernel"),
            bias_initializer=uniform("bias"),
            name=name,
        )

    return keras.Sequential(
        [
            keras.Input([features]),
            linear(features, hidden, "fc.0"),
            keras.layers.ReLU(name="fc.1"),
            linear(hidden, outputs, "fc.2"),
        ],
        name="head",
    )


class Encoder(keras.Model):
    """Images to features, and features to unit projections.

    Args:
        backbone: one of `clsa_tf.networks.resnet.BLOCKS`.
        width: factor on the backbone's channels.
        stem: one of `clsa_tf.networks.resnet.STEMS`.
        projection_size: `D`.
        bn_kind: see `clsa_tf.networks.batchnorm`.
        bn_splits: likewise.
        seed: int; same seed, same initial weights.
        precision: Keras policy of the backbone, such as `"mixed_bfloat16"`.
        name: of the model.

    Attributes:
        backbone: `keras.Model`, normalised images -> features.
        head: `keras.Model`, features -> projections.
    """

    def __init__(
        self,
        *,
        backbone="resnet50",
        width=1.0,
        stem="imagenet",
        projection_size=128,
        bn_kind="local",
        bn_splits=1,
        seed=0,
        precision="float32",
        name="encoder",
    ):
        """See the class."""
        super().__init__(name=name)
        self.backbone = resnet(
            backbone,
            width=width,
            stem=stem,
            bn_kind=bn_kind,
            bn_splits=bn_splits,
            seed=seed,
            precision=precision,
        )
        features = self.backbone.output_shape[-1]
        self.head = mlp(
            features, hidden=features, outputs=projection_size, seed=seed
        )

    def call(self, images, training=False):
        """Features float32 `[N, F]` of images (see `normalise`)."""
        return self.backbone(normalise(images), training=training)

    def project(self, images, training=False):
        """Projections float32 `[N, D]`, unit rows, of images."""
        projections = self.head(self(images, training=training))
        return unit(projections)


def weight_name(variable):
    """What a variable of an encoder is called in exports and digests."""
    return variable.name.split(":")[0]


def unit(rows):
    """Divides each row of float `[N, D]` by its length, at least in float32."""
    rows = rows if rows.dtype == tf.float64 else tf.cast(rows, tf.float32)
    # The squared length is floored at 1e-24: torch's floor of 1e-12 on the
    # length.
    return tf.math.l2_normalize(rows, axis=-1, epsilon=1e-24)
