import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter

from clsa_tf.augment import primitives, views, weak
from tests import pillow_chain

SIZES = [(1, 1), (2, 3), (5, 1), (1, 7), (3, 4), (32, 48)]
FACTORS = np.float32([0.0, 0.14, 0.5, 0.6, 0.86, 1.0, 1.25, 1.4])


def images_of(height, width):
    """A photograph, its grey version and one with flat channels."""
    image = pillow_chain.photograph(height, width, seed=height)
    flat = image.copy()
    flat[..., 0], flat[..., 2] = 77, 255
    return [image, image[..., [1, 1, 1]], flat]


def repeated(image, count):
    return np.repeat(image[np.newaxis], count, axis=0)


def draws(count, seed=1):
    seeds = tf.data.Dataset.range(count, output_type=tf.int32)
    drawn = seeds.map(lambda i: weak.draw(tf.stack([seed, i])))
    drawn = next(iter(drawn.batch(count)))
    return {name: value.numpy() for name, value in drawn.items()}


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("name", ["brightness", "contrast", "color"])
def test_enhancement_equals_pillow(name, height, width):
    for image in images_of(height, width):
        batch = repeated(image, len(FACTORS))
        results = getattr(primitives, name)(batch, FACTORS).numpy()
        enhancer = getattr(ImageEnhance, name.capitalize())
        enhancer = enhancer(Image.fromarray(image))
        for result, factor in zip(results, FACTORS):
            expected = np.asarray(enhancer.enhance(float(factor)))
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_blend_truncates_as_pillow_does_for_every_pair_of_bytes(compiled):
    """Compiled too: a fused product and sum would differ at factor 0.86."""
    first, second = np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2)
    first, second = [np.stack([x] * 3, axis=-1) for x in (first, second)]
    factors = np.float32([-0.5, 0.05, 0.86, 0.999, 1.7])
    blend = tf.function(primitives.blend, jit_compile=compiled)
    batches = [tf.constant(repeated(x, 5)) for x in (first, second)]
    results = blend(*batches, tf.constant(factors)).numpy()
    for result, factor in zip(results, factors):
        expected = Image.blend(
            Image.fromarray(first), Image.fromarray(second), float(factor)
        )
        np.testing.assert_array_equal(result, np.asarray(expected))


def test_gray_equals_pillow():
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).convert("L"))
    gray = primitives.to_gray(image[np.newaxis])
    assert gray.shape == (1, 200, 200, 1)
    np.testing.assert_array_equal(gray[0, ..., 0], expected)
    three = primitives.grayscale(image[np.newaxis])[0].numpy()
    np.testing.assert_array_equal(three, np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("height, width", SIZES)
def test_gaussian_blur_equals_pillow(height, width):
    rng = np.random.default_rng(1)
    sigma = np.concatenate(
        [
            [0.0, 0.1, 0.5, 1.0, 1.4, 1.41421, 1.41422, 2.0],
            rng.uniform(0.1, 2.0, 24),
        ]
    ).astype(np.float32)
    images = [pillow_chain.photograph(height, width)]
    images.append((images[0] % 2) * np.uint8(255))
    for image in images:
        batch = repeated(image, len(sigma))
        results = primitives.gaussian_blur(batch, sigma).numpy()
        for result, radius in zip(results, sigma):
            blur = ImageFilter.GaussianBlur(float(radius))
            expected = np.asarray(Image.fromarray(image).filter(blur))
            np.testing.assert_array_equal(result, expected)


def test_gaussian_blur_reaches_as_far_as_max_sigma_says():
    image = pillow_chain.photograph(20, 30)
    result = primitives.gaussian_blur(image[np.newaxis], [6.5], max_sigma=7.0)
    blur = ImageFilter.GaussianBlur(6.5)
    expected = np.asarray(Image.fromarray(image).filter(blur))
    np.testing.assert_array_equal(result[0], expected)


def test_gaussian_blur_golden_values():
    """Central value of a blurred white pixel, as measured with Pillow 13."""
    impulse = np.zeros([3, 15, 15, 3], np.uint8)
    impulse[:, 7, 7] = 255
    blurred = primitives.gaussian_blur(impulse, [0.1, 1.0, 2.0]).numpy()
    np.testing.assert_array_equal(blurred[:, 7, 7, 0], [249, 42, 9])


def assert_hue_equals_pillow(colours, shift):
    result = weak.shift_hue(colours[np.newaxis], [shift])[0]
    # The middle of the step, so that int() of the product gives the shift.
    factor = (shift + np.sign(shift) * 0.5) / 255
    expected = pillow_chain.hue(Image.fromarray(colours), factor)
    np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize("shift", [-25, -1, 0, 9, 25])
def test_hue_equals_pillow(shift):
    """Exact, not only within 1/255; the slow test below covers the rest."""
    values = np.unique(np.r_[0:256:5, 0:4, 252:256]).astype(np.uint8)
    cube = np.meshgrid(values, values, values)
    assert_hue_equals_pillow(np.stack(cube, axis=-1).reshape(1, -1, 3), shift)


@pytest.mark.slow
@pytest.mark.parametrize("red", range(0, 256, 32))
def test_hue_equals_pillow_for_all_colours(red):
    values = np.arange(256, dtype=np.uint8)
    cube = np.meshgrid(values[red : red + 32], values, values)
    colours = np.stack(cube, axis=-1).reshape(1, -1, 3)
    for shift in (0, 17):
        assert_hue_equals_pillow(colours, shift)


def test_whole_chain_equals_pillow():
    image = pillow_chain.photograph(40, 40)
    chain = tf.function(weak.apply)
    for i in range(120):
        params = weak.draw([i, 1])
        result = chain(tf.constant(image), params)
        expected = pillow_chain.weak(image, params)
        np.testing.assert_array_equal(result, expected)


def test_eager_map_and_function_agree():
    image = tf.constant(pillow_chain.photograph(24, 31))

    def chain(i):
        return weak.apply(image, weak.draw(tf.stack([i, 2])))

    mapped = tf.data.Dataset.range(12, output_type=tf.int32).map(chain)
    traced = tf.function(chain)
    for i, result in enumerate(mapped):
        np.testing.assert_array_equal(chain(tf.constant(i)), result)
        np.testing.assert_array_equal(traced(tf.constant(i)), result)


def test_draws_have_the_stated_probabilities():
    count = 12000
    drawn = draws(count)
    stated = {"jitter": 0.8, "gray": 0.2, "blur": 0.5, "flip": 0.5}
    for name, p in stated.items():
        deviation = np.sqrt(p * (1 - p) / count)
        assert abs(drawn[name].mean() - p) < 3.3 * deviation, name
    # Coins are tossed independently of one another.
    coins = np.stack([drawn[name] for name in stated]).astype(float)
    assert np.abs(np.corrcoef(coins) - np.eye(4)).max() < 0.04


def test_draws_have_the_stated_ranges():
    drawn = draws(4000)
    low = np.array([0.6, 0.6, 0.6, -0.1, 0.1])
    high = np.array([1.4, 1.4, 1.4, 0.1, 2.0])
    values = np.c_[drawn["factors"], drawn["sigma"]]
    shares = (values - low) / (high - low)
    assert shares.min() > -1e-6 and shares.max() < 1 + 1e-6
    for share in shares.T:
        counts = np.histogram(share, 10, (0, 1))[0]
        # 99.9 % point of chi-square with 9 degrees of freedom.
        assert ((counts - 400) ** 2 / 400).sum() < 27.9


def test_host_and_compiled_draws_agree():
    """Decisions exactly; a fused multiply-add may move a factor by an ulp."""
    draw = tf.function(weak.draw, jit_compile=True)
    for i in range(20):
        compiled = draw(tf.constant([i, 3]))
        for name, value in weak.draw([i, 3]).items():
            if value.dtype == tf.float32:
                np.testing.assert_allclose(compiled[name], value, atol=2e-7)
            else:
                np.testing.assert_array_equal(compiled[name], value)


def test_order_of_the_jitter_is_a_uniform_permutation():
    order = draws(4800)["order"]
    np.testing.assert_array_equal(
        np.sort(order, axis=1), np.tile(np.arange(4), (4800, 1))
    )
    counts = np.unique(order, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7  # 23 degrees, 99.9 %


VIEW = views.View("query", size=32, min_area=0.2, max_area=1.0)


def test_a_view_is_a_function_of_its_seed():
    image = tf.constant(pillow_chain.photograph(50, 61))

    @tf.function
    def make(seed):
        return views.make_view(image, seed, view=VIEW)

    results = [make(tf.constant([7, i])).numpy() for i in range(20)]
    again = [make(tf.constant([7, i])).numpy() for i in range(20)]
    np.testing.assert_array_equal(results, again)
    assert results[0].shape == (32, 32, 3) and results[0].dtype == np.uint8
    assert len({result.tobytes() for result in results}) == 20


@pytest.mark.parametrize("height, width", [(90, 70), (64, 64), (1, 1), (3, 2)])
def test_view_equals_pillow_up_to_the_rounding_of_the_crop(height, width):
    image = pillow_chain.photograph(height, width)
    for i in range(15):
        params = views.draw_view([i, 3], view=VIEW, height=height, width=width)
        result = views.apply_view(image, params, view=VIEW).numpy()
        assert "strong" not in params
        expected = pillow_chain.view(image, params, VIEW.size)
        difference = np.abs(result.astype(int) - expected)
        # A crop that is off by one may land in the next step of the hue.
        assert np.mean(difference) < 0.5 and np.mean(difference > 3) < 0.02
        made = views.make_view(image, [i, 3], view=VIEW)
        np.testing.assert_array_equal(made, result)


def test_crop_and_chain_are_drawn_independently():
    shares, brightness = [], []
    for i in range(300):
        params = views.draw_view([i, 4], view=VIEW, height=500, width=500)
        shares.append(params["box"][2] * params["box"][3])
        brightness.append(params["weak"]["factors"][0])
    assert abs(np.corrcoef(shares, brightness)[0, 1]) < 0.19
