import numpy as np
import pytest
import tensorflow as tf

from benchmarks import pillow_chain
from clsa_tf.augment import primitives, texture

# Compared with Pillow, to the bit.
pytestmark = pytest.mark.usefixtures("rewritten_graphs")

SIZES = [(1, 1), (2, 3), (5, 1), (20, 31)]
COUNT = 40

compiled = tf.function(texture.randomize, jit_compile=True)


def draws(count, probability=0.5):
    uniform = primitives.uniform([3, 1], shape=[count, texture.NUM_UNIFORMS])
    rows = tf.data.Dataset.from_tensor_slices(uniform)
    rows = rows.map(lambda x: texture.draw(x, probability=probability))
    rows = next(iter(rows.batch(count)))
    return {name: value.numpy() for name, value in rows.items()}


def row(params, i):
    return {name: value[i : i + 1] for name, value in params.items()}


def transposed(images):
    """u8[N,H,W,3] -> u8[N,3,W,H]."""
    return tf.constant(np.transpose(images, [0, 3, 2, 1]))


def upright(planes):
    """u8[N,3,W,H] -> u8[N,H,W,3]."""
    return np.transpose(planes, [0, 3, 2, 1])


def images_of(height, width, count=COUNT):
    """Photographs, and the hardest case: every pixel 0 or 255."""
    images = [
        pillow_chain.photograph(height, width, seed=i) for i in range(count)
    ]
    images[::2] = [(x % 2) * np.uint8(255) for x in images[::2]]
    return np.stack(images)


@pytest.mark.parametrize("height, width", SIZES)
def test_texture_equals_the_reference_eager_and_compiled(height, width):
    """Byte for byte: one image or several, compiled or eager."""
    images, params = images_of(height, width), draws(COUNT)
    together = upright(compiled(transposed(images), params))
    eager = upright(texture.randomize(transposed(images), params))
    assert together.dtype == np.uint8
    for i, image in enumerate(images):
        own = {name: value[i] for name, value in params.items()}
        expected = pillow_chain.texture(image, own)
        np.testing.assert_array_equal(together[i], expected)
        np.testing.assert_array_equal(eager[i], expected)
        alone = compiled(transposed(images[i : i + 1]), row(params, i))
        np.testing.assert_array_equal(upright(alone)[0], expected)


@pytest.mark.parametrize("signs", [[1] * 4 + [-1] * 5, [-1, 1] * 4 + [1]])
def test_the_largest_kernels_are_exact(signs):
    """With these kernels float32 would round first."""
    images = images_of(20, 31, count=8)
    # Uniform numbers next to 0 and 1.
    kernel = np.where(np.array(signs) > 0, 1 - 2.0**-23, 0)
    uniform = tf.constant(np.r_[0, 0, kernel], tf.float32)
    drawn = texture.draw(uniform, probability=1.0)
    assert np.abs(drawn["kernel"]).sum() > 8 * texture.UNIT
    assert drawn["kernel"].numpy().sum() == texture.UNIT
    params = {name: np.stack([x.numpy()] * 8) for name, x in drawn.items()}
    results = upright(compiled(transposed(images), params))
    for image, result in zip(images, results):
        expected = pillow_chain.texture(image, drawn)
        np.testing.assert_array_equal(result, expected)


def test_unit_kernels_keep_or_shift_the_image():
    image = images_of(6, 7, count=1)
    unit = texture.UNIT * np.eye(9, dtype=np.int32)
    params = {"kernel": unit[[4]], "alpha": np.int32([0])}
    same = upright(texture.randomize(transposed(image), params))
    np.testing.assert_array_equal(same, image)
    # Takes the top right neighbour; at the border, the border is repeated.
    params["kernel"] = unit[[2]]
    shifted = upright(texture.randomize(transposed(image), params))
    expected = np.pad(image, [(0, 0), (1, 0), (0, 1), (0, 0)], "edge")
    np.testing.assert_array_equal(shifted, expected[:, :6, 1:])
    # With the original alone nothing changes.
    params["alpha"] = np.int32([texture.UNIT])
    same = upright(texture.randomize(transposed(image), params))
    np.testing.assert_array_equal(same, image)


def test_images_of_one_colour_do_not_change():
    colours = np.random.default_rng(0).integers(0, 256, [COUNT, 1, 1, 3])
    images = np.tile(colours, [1, 5, 6, 1]).astype(np.uint8)
    result = upright(texture.randomize(transposed(images), draws(COUNT)))
    np.testing.assert_array_equal(result, images)


def test_texture_changes_while_colours_and_shapes_stay():
    images = np.stack(
        [pillow_chain.photograph(160, 160, seed=i) for i in range(COUNT)]
    )
    params = draws(COUNT)
    params["alpha"][:] = 16  # a quarter of the original
    changed = upright(texture.randomize(transposed(images), params))

    def coarse(images):
        return images.reshape(COUNT, 5, 32, 5, 32, 3).mean(axis=(2, 4))

    # Mean colours of 25 patches; 255 is the largest difference.
    difference = np.abs(coarse(changed) - coarse(images))
    assert difference.mean() < 3 and difference.max() < 20
    # Differences between neighbouring pixels become larger or smaller.
    before, after = (
        np.diff(x.astype(float), axis=2).std(axis=(1, 2, 3))
        for x in (images, changed)
    )
    ratio = np.exp(np.abs(np.log(after / before)))
    assert np.median(ratio) > 1.2 and (ratio > 1.01).all()


def test_draws_have_the_stated_probability():
    for probability in (0.2, 0.5):
        applied = draws(6000, probability)["apply"].mean()
        deviation = np.sqrt(probability * (1 - probability) / 6000)
        assert abs(applied - probability) < 3.3 * deviation


def test_kernels_sum_to_one_and_spread_as_stated():
    params = draws(6000)
    kernel, alpha = params["kernel"], params["alpha"]
    np.testing.assert_array_equal(kernel.sum(axis=1), texture.UNIT)
    others = np.delete(kernel, 4, axis=1)
    # A difference of two uniform numbers in [-1, 1] is triangular.
    difference = (others[:, 0] - others[:, 1]) / texture.UNIT
    assert 1.9 < np.abs(difference).max() <= 2
    assert abs(difference.var() - 2 / 3) < 0.04
    # All nine have one distribution, except the remainder in the centre.
    mean, deviation = kernel.mean(axis=0), kernel.std(axis=0)
    np.testing.assert_allclose(mean, texture.UNIT / 9, atol=7)
    np.testing.assert_allclose(deviation, deviation.mean(), rtol=0.05)
    assert alpha.min() == 0 and alpha.max() == texture.UNIT
    counts = np.bincount(alpha)
    expected = 6000 / len(counts)
    # 99.9 % point of chi-square with 64 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 104.7
    flat = np.corrcoef(np.c_[alpha, difference, params["apply"]].T)
    assert np.abs(flat - np.eye(3)).max() < 0.05
