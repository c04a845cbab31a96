"""ResNet-18, -34 and -50 in Keras, equal to torchvision's.

ResNet-50 of `keras.applications` differs: it has its stride in the first 1x1
convolution, biases in the convolutions and other constants. These ResNets have
the stride in the 3x3 convolution ("v1.5"), symmetric padding, batch
normalisation with epsilon 1e-5 and He-normal fan-out initialisation. Layers
have torchvision's names, such as `layer3.0.conv2`.
"""

import zlib

from tensorflow import keras

from clsa_tf.networks.batchnorm import batch_norm

BLOCKS = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
}
STEMS = ("imagenet", "small")
# With fewer input channels, the gradient of a 1x1 convolution with stride 2
# corrupts memory: oneDNN of TensorFlow 2.15.1, 8 -> 16 channels, 48 or 64 px.
_ONEDNN_CHANNELS = 16


def resnet(
    depth,
    *,
    width=1.0,
    stem="imagenet",
    bn_kind="local",
    bn_splits=1,
    seed=0,
    precision="float32",
    name="backbone",
):
    """Builds a ResNet trunk, up to and including global average pooling.

    Args:
        depth: `"resnet18"`, `"resnet34"` or `"resnet50"`.
        width: factor on all channel counts; 1.0 is the published width.
        stem: `"imagenet"` (7x7 stride 2, then 3x3 max-pool stride 2) or
            `"small"` (3x3 stride 1, no pool: for images of about 32 px).
        bn_kind: see `clsa_tf.networks.batchnorm.batch_norm`.
        bn_splits: see `clsa_tf.networks.batchnorm.batch_norm`.
        seed: int, determines the initial weights.
        precision: Keras policy of the layers; features are always float32.
        name: name of the model.

    Returns:
        `keras.Model`: float32 `[N, H, W, 3]` (normalised) -> float32 `[N, F]`
        features, `F` = 512 (18, 34) or 2048 (50), times `width`.

    Source: torchvision `models/resnet.py`.
    """
    bottleneck, blocks = BLOCKS[depth]
    build = _Builder(bn_kind, bn_splits, seed, precision)
    channels = int(64 * width)
    images = keras.Input([None, None, 3])
    if stem == "imagenet":
        x = build.conv_bn(images, channels, 7, 2, "conv1", "bn1")
        # torch pads the max-pool with -inf; after a ReLU, 0 is equivalent.
        x = build.layer("ZeroPadding2D", 1, name="maxpool.pad")(x)
        x = build.layer("MaxPool2D", 3, 2, name="maxpool")(x)
    else:
        x = build.conv_bn(images, channels, 3, 1, "conv1", "bn1")
    block = build.bottleneck if bottleneck else build.basic
    for i, count in enumerate(blocks):
        for j in range(count):
            stride = 2 if i > 0 and j == 0 else 1
            x = block(x, channels * 2**i, stride, f"layer{i + 1}.{j}")
    features = keras.layers.GlobalAveragePooling2D(
        name="avgpool", dtype="float32"
    )(x)
    return keras.Model(images, features, name=name)


class _Builder:
    """Adds layers with torchvision's names, paddings and initial weights."""

    def __init__(self, bn_kind, bn_splits, seed, precision):
        self._bn = dict(kind=bn_kind, splits=bn_splits, dtype=precision)
        self._seed = seed
        self._precision = precision

    def layer(self, kind, *arguments, **options):
        """Returns `keras.layers.<kind>` of the network's precision."""
        make = getattr(keras.layers, kind)
        return make(*arguments, dtype=self._precision, **options)

    def conv_bn(self, x, filters, kernel, stride, conv, bn, relu=True):
        if kernel > 1:
            # "same" would pad asymmetrically with a stride of 2.
            x = self.layer("ZeroPadding2D", kernel // 2, name=conv + ".pad")(x)
        x = self.layer(
            "Conv2D",
            filters,
            kernel,
            stride,
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0,
                "fan_out",
                "untruncated_normal",
                seed=layer_seed(self._seed, conv),
            ),
            name=conv,
        )(x)
        x = batch_norm(**self._bn, name=bn)(x)
        return self.layer("ReLU", name=bn + ".relu")(x) if relu else x

    def basic(self, x, filters, stride, name):
        y = self.conv_bn(x, filters, 3, stride, f"{name}.conv1", f"{name}.bn1")
        y = self.conv_bn(
            y, filters, 3, 1, f"{name}.conv2", f"{name}.bn2", relu=False
        )
        return self._add(x, y, filters, stride, name)

    def bottleneck(self, x, filters, stride, name):
        y = self.conv_bn(x, filters, 1, 1, f"{name}.conv1", f"{name}.bn1")
        y = self.conv_bn(y, filters, 3, stride, f"{name}.conv2", f"{name}.bn2")
        y = self.conv_bn(
            y, 4 * filters, 1, 1, f"{name}.conv3", f"{name}.bn3", relu=False
        )
        return self._add(x, y, 4 * filters, stride, name)

    def _add(self, x, y, filters, stride, name):
        if stride != 1 or x.shape[-1] != filters:
            shortcut = f"{name}.downsample"
            if stride > 1 and x.shape[-1] < _ONEDNN_CHANNELS:
                # Selects the same pixels without a stride in the convolution.
                x = self.layer(
                    "MaxPool2D", 1, stride, name=shortcut + ".stride"
                )(x)
                stride = 1
            x = self.conv_bn(
                x, filters, 1, stride, shortcut + ".0", shortcut + ".1", False
            )
        x = self.layer("Add", name=f"{name}.add")([x, y])
        return self.layer("ReLU", name=f"{name}.relu")(x)


def layer_seed(seed, name):
    """Seed of a layer's initial weights, from `seed` and the layer's name."""
    return zlib.crc32(f"{seed}/{name}".encode()) & 0x7FFFFFFF
