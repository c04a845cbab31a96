import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.networks.backbones.resnet import resnet
from clsa_tf.networks.batchnorm import batch_norm
from clsa_tf.networks.encoder import MEAN, STDDEV, Encoder, normalise, unit
from clsa_tf.networks.heads import Head


def small(**changes):
    return Encoder(
        **{
            "backbone": "resnet18",
            "width": 0.125,
            "stem": "small",
            "head": Head(outputs=6),
        }
        | changes
    )


@pytest.mark.parametrize(
    "depth, parameters, features",
    # torchvision's counts without those of the final linear layer.
    [
        ("resnet18", 11_176_512, 512),
        ("resnet34", 21_284_672, 512),
        ("resnet50", 23_508_032, 2048),
    ],
)
def test_parameter_counts_equal_torchvisions(depth, parameters, features):
    model = resnet(depth)
    trainable = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert trainable == parameters
    assert model.output_shape == (None, features)


def test_width_and_stem_change_the_layers():
    model = resnet("resnet50", width=0.25, stem="small")
    assert model.output_shape == (None, 512)
    assert model.get_layer("conv1").kernel.shape == [3, 3, 3, 16]
    assert model.get_layer("conv1").strides == (1, 1)


def test_the_3x3_convolution_has_the_stride_and_symmetric_padding():
    model = resnet("resnet50", width=0.0625)
    assert model.get_layer("layer2.0.conv1").strides == (1, 1)
    conv = model.get_layer("layer2.0.conv2")
    assert conv.strides == (2, 2) and conv.padding == "valid"
    pad = model.get_layer("layer2.0.conv2.pad")
    assert pad.padding == ((1, 1), (1, 1))
    # With symmetric padding of an even side, the first window starts one pixel
    # outside the image, so that the corner meets the centre of the kernel.
    image = np.zeros([1, 4, 4, conv.kernel.shape[2]], np.float32)
    image[0, 0, 0] = 1.0
    out = conv(pad(image))
    np.testing.assert_allclose(
        out[0, 0, 0], tf.reduce_sum(conv.kernel[1, 1], 0), atol=1e-6
    )
    assert out.shape[1:3] == [2, 2]


@pytest.mark.parametrize("width", [0.125, 0.0625])
def test_no_convolution_of_one_pixel_skips_pixels_of_few_channels(width):
    """Its gradient corrupts memory in oneDNN of TensorFlow 2.15.1."""
    model = resnet("resnet18", width=width, stem="small")
    shortcuts = 0
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.Conv2D):
            *kernel, channels, _ = layer.kernel.shape
            shortcuts += ".downsample." in layer.name
            if kernel == [1, 1] and layer.strides != (1, 1):
                assert channels >= 16, layer.name
    assert shortcuts == 3


@pytest.mark.parametrize("side", [6, 7])
def test_the_way_around_equals_the_convolution_with_a_stride(side):
    model = resnet("resnet18", width=0.125, stem="small")
    convolution = model.get_layer("layer2.0.downsample.0")
    assert convolution.kernel.shape == [1, 1, 8, 16]
    pixels = model.get_layer("layer2.0.downsample.stride")
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=[2, side, side, 8]), tf.float32)

    def both(function, *inputs):
        """Output and gradients of a random multiple of it."""
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = function(*inputs)
            ups = np.random.default_rng(1).normal(size=output.shape)
            total = tf.reduce_sum(output * tf.cast(ups, output.dtype))
        return output, *tape.gradient(total, inputs)

    found = both(lambda x, _: convolution(pixels(x)), x, convolution.kernel)
    # In float64, which oneDNN leaves to others.
    expected = both(
        lambda x, kernel: tf.nn.conv2d(x, kernel, strides=2, padding="VALID"),
        *(tf.cast(value, tf.float64) for value in (x, convolution.kernel)),
    )
    for mine, other in zip(found, expected):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_initial_weights_follow_torch():
    model = resnet("resnet18")
    for name, kernel in (("layer1.0.conv1", 3), ("layer2.0.downsample.0", 1)):
        weights = model.get_layer(name).kernel.numpy()
        fan_out = kernel * kernel * weights.shape[3]
        assert weights.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            assert (layer.gamma.numpy() == 1).all()  # no zero-init residual
            assert (layer.beta.numpy() == 0).all()
            assert layer.epsilon == 1e-5 and layer.momentum == 0.9
    first = small().heads[0].get_layer("fc.0")
    bound = first.kernel.shape[0] ** -0.5
    for weights in (first.kernel, first.bias):
        assert 0.8 * bound < np.abs(weights).max() <= bound


def test_seed_decides_the_initial_weights():
    one, same, other = (small(seed=s).get_weights() for s in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert not np.allclose(one[0], other[0])


def test_normalise_gives_equal_results_for_bytes_and_unit_floats():
    images = np.random.default_rng(0).integers(0, 256, [2, 3, 3, 3], np.uint8)
    expected = (images / 255.0 - MEAN) / STDDEV
    np.testing.assert_allclose(
        normalise(tf.constant(images)), expected, atol=1e-5
    )
    floats = tf.constant(np.float32(images / 255.0))
    np.testing.assert_allclose(normalise(floats), expected, atol=1e-5)


def test_tiny_rows_are_normalised_to_unit_length():
    rows = unit(tf.constant([[3.0, 4.0], [3e-10, 4e-10], [0.0, 0.0]]))
    np.testing.assert_allclose(
        rows, [[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]], atol=1e-6
    )


def test_running_variance_is_torchs_unbiased_one():
    layer = batch_norm("local", name="bn")
    x = np.random.default_rng(0).normal(size=[2, 2, 2, 3]).astype(np.float32)
    layer(x, training=True)
    flat = x.reshape(-1, 3)
    expected = 0.9 * 1.0 + 0.1 * flat.var(axis=0, ddof=1)
    np.testing.assert_allclose(layer.moving_variance, expected, rtol=1e-5)
    np.testing.assert_allclose(
        layer.moving_mean, 0.1 * flat.mean(axis=0), rtol=1e-4, atol=1e-7
    )


def test_split_normalises_each_part_by_itself():
    split = batch_norm("split", splits=2, name="split")
    x = np.random.default_rng(0).normal(size=[6, 2, 2, 3]).astype(np.float32)
    x[3:] += 5.0
    got = split(x, training=True)
    parts, means = [], []
    for part in (x[:3], x[3:]):
        local = batch_norm("local", name="local")
        parts.append(local(part, training=True))
        means.append(local.moving_mean)
    np.testing.assert_allclose(got, np.concatenate(parts), atol=1e-5)
    np.testing.assert_allclose(
        split.moving_mean, np.mean(means, axis=0), atol=1e-6
    )
    # In inference it equals ordinary batch normalisation.
    local.set_weights(split.get_weights())
    np.testing.assert_allclose(split(x), local(x), atol=1e-6)


def test_backbone_survives_saving_in_kerass_format(tmp_path):
    encoder = small(bn_kind="split", bn_splits=2)
    images = np.random.default_rng(0).random([2, 16, 16, 3], np.float32)
    path = str(tmp_path / "backbone.keras")
    encoder.backbone.save(path)
    again = tf.keras.models.load_model(path)
    np.testing.assert_array_equal(again(images), encoder.backbone(images))
