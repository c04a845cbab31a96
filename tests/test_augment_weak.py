import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from benchmarks import pillow_chain
from clsa_tf.augment import primitives, weak
from clsa_tf.augment.blur import MAX_SIGMA, blur_and_transpose
from clsa_tf.augment.hue import shift_hue
from clsa_tf.augment.views import View
from tests.marks import slow_but

# Compared with Pillow, to the bit.
pytestmark = pytest.mark.usefixtures("rewritten_graphs")

SIZES = [(1, 1), (2, 3), (5, 1), (1, 7), (3, 4), (32, 48)]
FACTORS = np.float32([0.0, 0.14, 0.2, 0.6, 0.86, 1.0, 1.4, 1.8])
# Like published views, except for some probabilities.
SETTINGS = {
    "MoCo v2": {},
    "MoCo v1": dict(
        jitter=(0.4,) * 4,
        jitter_probability=1.0,
        gray=0.5,
        gray_first=True,
        blur=0.0,
    ),
    "SimCLR": dict(jitter=(0.8, 0.8, 0.8, 0.2)),
    "BYOL": dict(jitter=(0.4, 0.4, 0.2, 0.1), blur=0.1, solarize=0.2),
    "all": dict(
        jitter=(1.5, 0, 0.1, 0.5), rotation=True, texture=0.5, solarize=0.5
    ),
}


def images_of(height, width):
    """A photograph, its grey version and one with flat channels."""
    image = pillow_chain.photograph(height, width, seed=height)
    flat = image.copy()
    flat[..., 0], flat[..., 2] = 77, 255
    return [image, image[..., [1, 1, 1]], flat]


def repeated(image, count):
    """[H,W,3] -> [N,3,H,W]."""
    return np.repeat(np.moveaxis(image, -1, 0)[np.newaxis], count, axis=0)


def rows_of(planes):
    """[N,3,H,W] -> [N,H,W,3]."""
    return np.moveaxis(np.asarray(planes), 1, -1)


def view_of(**settings):
    return View("view", 1, 1, 1, **settings)


def draw(uniform, **settings):
    """Draws a view's parameters from uniform numbers."""
    needs = weak.num_uniforms(view_of(**settings))
    parts = tf.split(uniform, list(needs.values()))
    return weak.draw(dict(zip(needs, parts)), view_of(**settings))


def draws(count, seed=1, **settings):
    needs = sum(weak.num_uniforms(view_of(**settings)).values())
    uniform = primitives.uniform([seed, 0], shape=[count, needs])
    rows = tf.data.Dataset.from_tensor_slices(uniform)
    rows = next(iter(rows.map(lambda x: draw(x, **settings)).batch(count)))
    return tf.nest.map_structure(lambda x: x.numpy(), rows)


def transposed(images):
    return tf.transpose(images, [0, 1, 3, 2])


def apply(images, params, gray_first=False):
    return weak.apply(transposed(images), params, gray_first=gray_first)


def gaussian_blur(images, sigma):
    return blur_and_transpose(transposed(images), sigma)


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("name", ["brightness", "contrast", "color"])
def test_enhancement_equals_pillow(name, height, width):
    for image in images_of(height, width):
        batch = repeated(image, len(FACTORS))
        results = rows_of(getattr(primitives, name)(batch, FACTORS))
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
    factors = np.float32([-0.5, 0.05, 0.86, 1.4, 1.8])
    blend = tf.function(primitives.blend, jit_compile=compiled)
    batches = [tf.constant(repeated(x, 5)) for x in (first, second)]
    results = rows_of(blend(*batches, tf.constant(factors)))
    for result, factor in zip(results, factors):
        expected = Image.blend(
            Image.fromarray(first), Image.fromarray(second), float(factor)
        )
        np.testing.assert_array_equal(result, np.asarray(expected))


def test_gray_equals_pillow():
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).convert("L"))
    gray = primitives.luma(repeated(image, 1))
    assert gray.shape == (1, 1, 200, 200) and gray.dtype == tf.int32
    np.testing.assert_array_equal(gray[0, 0], expected)
    three = rows_of(primitives.grayscale(repeated(image, 1)))[0]
    np.testing.assert_array_equal(three, np.stack([expected] * 3, axis=-1))


compiled_blur = tf.function(gaussian_blur, jit_compile=True)


@pytest.mark.parametrize(
    "height, width, blur_batch",
    [(*size, gaussian_blur) for size in SIZES]
    + [(3, 4, compiled_blur), (32, 48, compiled_blur)],
)
def test_gaussian_blur_equals_pillow(height, width, blur_batch):
    rng = np.random.default_rng(1)
    sigma = np.concatenate(
        [
            [0.0, 0.1, 0.5, 1.0, 1.4, 1.41421, 1.41422, MAX_SIGMA],
            rng.uniform(0.1, 2.0, 24),
        ]
    ).astype(np.float32)
    images = [pillow_chain.photograph(height, width)]
    images.append((images[0] % 2) * np.uint8(255))
    for image in images:
        batch = repeated(image, len(sigma))
        results = rows_of(blur_batch(tf.constant(batch), tf.constant(sigma)))
        for result, radius in zip(results, sigma):
            blur = ImageFilter.GaussianBlur(float(radius))
            expected = np.asarray(Image.fromarray(image).filter(blur))
            np.testing.assert_array_equal(result, expected)


def test_gaussian_blur_equals_golden_values():
    """Central value of a blurred white pixel, as measured with Pillow 13."""
    impulse = np.zeros([3, 3, 15, 15], np.uint8)
    impulse[..., 7, 7] = 255
    blurred = gaussian_blur(impulse, [0.1, 1.0, 2.0]).numpy()
    np.testing.assert_array_equal(blurred[:, 0, 7, 7], [249, 42, 9])


# In a compiled chain XLA must not fuse its sums with products.
HUES = [shift_hue, tf.function(shift_hue, jit_compile=True)]


def assert_hue_equals_pillow(call, colours, shift):
    result = call(tf.constant(repeated(colours, 1)), tf.constant([shift]))
    # The middle of the step, so that int() of the product gives the shift.
    factor = (shift + np.sign(shift) * 0.5) / 255
    expected = pillow_chain.hue(Image.fromarray(colours), factor)
    np.testing.assert_array_equal(rows_of(result)[0], np.asarray(expected))


@pytest.mark.parametrize("call", HUES)
@pytest.mark.parametrize("shift", [-127, -25, -1, 0, 9, 25, 102])
def test_hue_equals_pillow(shift, call):
    """Exact, not only within 1/255; the slow test below covers the rest."""
    values = np.unique(np.r_[0:256:5, 0:4, 252:256]).astype(np.uint8)
    cube = np.meshgrid(values, values, values)
    colours = np.stack(cube, axis=-1).reshape(1, -1, 3)
    assert_hue_equals_pillow(call, colours, shift)


@pytest.mark.slow
@pytest.mark.parametrize("call", HUES)
@pytest.mark.parametrize("red", range(0, 256, 32))
def test_hue_equals_pillow_for_all_colours(red, call):
    values = np.arange(256, dtype=np.uint8)
    cube = np.meshgrid(values[red : red + 32], values, values)
    colours = np.stack(cube, axis=-1).reshape(1, -1, 3)
    for shift in (0, 17):
        assert_hue_equals_pillow(call, colours, shift)


def test_solarize_equals_pillow():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = np.asarray(ImageOps.solarize(Image.fromarray(image), 128))
    result = primitives.solarize(repeated(image, 1))
    np.testing.assert_array_equal(rows_of(result)[0], expected)
    assert expected[7, 15, 0] == 127 and expected[8, 0, 0] == 127


@pytest.mark.parametrize("turns", range(4))
def test_rotation_equals_pillow(turns):
    """Counter-clockwise; the whole chain with no other part applied."""
    image = pillow_chain.photograph(9, 9)
    never = dict(jitter_probability=0, gray=0, blur=0, flip=0)
    params = draws(1, **never, rotation=True)
    params = {name: tf.constant(value) for name, value in params.items()}
    params["rotation"] = tf.constant([turns])
    result = rows_of(apply(repeated(image, 1), params))[0]
    expected = Image.fromarray(image).rotate(90 * turns)
    np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize(
    "settings", slow_but(1, SETTINGS.values()), ids=SETTINGS
)
def test_whole_chain_equals_pillow_eager_mapped_and_compiled(settings):
    # Quarter turns need square images.
    width = 40 if "rotation" in settings else 31
    image = pillow_chain.photograph(40, width)
    images = tf.constant(repeated(image, 120))
    drawn = draws(120, seed=2, **settings)
    first = settings.get("gray_first", False)

    def run(images, params):
        return apply(images, params, gray_first=first)

    compiled = tf.function(run, jit_compile=True, autograph=False)
    selected = rows_of(compiled(images, drawn))

    rows = tf.data.Dataset.from_tensor_slices((images, drawn)).batch(1, True)
    mapped = list(rows.map(run).as_numpy_iterator())
    for i, (batch, params) in enumerate(rows):
        own = tf.nest.map_structure(lambda x, i=i: x[i], drawn)
        expected = pillow_chain.weak(image, own, gray_first=first)
        np.testing.assert_array_equal(selected[i], expected)
        np.testing.assert_array_equal(rows_of(mapped[i])[0], expected)
        switched = compiled(batch, params)
        np.testing.assert_array_equal(rows_of(switched)[0], expected)
        if i < 12:
            eager = run(batch, params)
            np.testing.assert_array_equal(rows_of(eager)[0], expected)

    some = tf.nest.map_structure(lambda x: tf.constant(x[:30]), drawn)
    eager = run(images[:30], some)
    np.testing.assert_array_equal(rows_of(eager), selected[:30])


OTHERS = dict(
    jitter_probability=0.3, gray=0.9, blur=0.1, flip=0.05, solarize=0.2
)


@pytest.mark.parametrize(
    "settings, stated",
    [
        ({}, {"jitter": 0.8, "gray": 0.2, "blur": 0.5, "flip": 0.5}),
        (OTHERS, {"jitter": 0.3} | dict(list(OTHERS.items())[1:])),
    ],
    ids=["default", "others"],
)
def test_draws_have_the_stated_probabilities(settings, stated):
    count = 12000
    drawn = draws(count, **settings)
    for name, p in stated.items():
        deviation = np.sqrt(p * (1 - p) / count)
        assert abs(drawn[name].mean() - p) < 3.3 * deviation, name
    # Decisions are independent of one another.
    decisions = np.stack([drawn[name] for name in stated]).astype(float)
    assert np.abs(np.corrcoef(decisions) - np.eye(len(decisions))).max() < 0.04


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_probabilities_zero_and_one_are_exact(probability):
    drawn = draws(
        500,
        jitter_probability=probability,
        **dict.fromkeys(("gray", "blur", "flip", "solarize"), probability),
    )
    assert ("solarize" in drawn) == bool(probability)
    for name in {"jitter", "gray", "blur", "flip", "solarize"} & set(drawn):
        assert (drawn[name] == bool(probability)).all()


@pytest.mark.parametrize(
    "jitter, low, high",
    [
        (None, [0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1]),
        ((0.8, 0.1, 0.2, 0.5), [0.2, 0.9, 0.8, -0.5], [1.8, 1.1, 1.2, 0.5]),
        ((1.0, 1.5, 3.0, 0.2), [0, 0, 0, -0.2], [2.0, 2.5, 4.0, 0.2]),
    ],
)
def test_draws_have_the_stated_ranges(jitter, low, high):
    drawn = draws(4000, **({"jitter": jitter} if jitter else {}))
    low, high = np.array(low + [0.1]), np.array(high + [2.0])
    values = np.c_[drawn["factors"], drawn["sigma"]]
    assert values[:, :3].min() >= 0
    shares = (values - low) / (high - low)
    assert shares.min() > -1e-6 and shares.max() < 1 + 1e-6
    for share in shares.T:
        counts = np.histogram(share, 10, (0, 1))[0]
        # 99.9 % point of chi-square with 9 degrees of freedom.
        assert ((counts - 400) ** 2 / 400).sum() < 27.9


def test_a_strength_of_zero_changes_nothing():
    factors = draws(50, jitter=(0, 0, 0, 0))["factors"]
    np.testing.assert_array_equal(factors, np.tile([1, 1, 1, 0], (50, 1)))


def test_quarter_turns_are_equally_likely():
    counts = np.bincount(draws(4000, rotation=True)["rotation"])
    assert len(counts) == 4
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # 3 degrees, 99.9 %


def test_absent_parts_need_no_numbers():
    plain, full = view_of(), view_of(**SETTINGS["all"])
    absent = {"rotation", "texture", "solarize"}
    assert sum(weak.num_uniforms(plain).values()) == 10
    for name in absent:
        assert (
            weak.num_uniforms(plain)[name] == 0 < weak.num_uniforms(full)[name]
        )
    assert set(weak.specs(full)) - set(weak.specs(plain)) == absent
    for settings in ({}, SETTINGS["all"]):
        specs = weak.specs(view_of(**settings))
        drawn = draws(1, **settings)
        tf.nest.assert_same_structure(specs, drawn)
        for spec, x in zip(tf.nest.flatten(specs), tf.nest.flatten(drawn)):
            assert spec.shape == x.shape[1:] and spec.dtype == x.dtype


def test_host_and_compiled_draws_agree():
    """Decisions exactly; a fused multiply-add may move a factor by an ulp."""

    def draw_all(uniform):
        return draw(uniform, **SETTINGS["all"])

    def assert_agree(one, other):
        if one.dtype == tf.float32:
            np.testing.assert_allclose(one, other, atol=2e-7)
        else:
            np.testing.assert_array_equal(one, other)

    compiled_draw = tf.function(draw_all, jit_compile=True)
    for i in range(20):
        uniform = primitives.uniform([i, 3], shape=[23])
        others = compiled_draw(uniform)
        tf.nest.map_structure(assert_agree, draw_all(uniform), others)


def test_uniform_numbers_are_the_same_everywhere():
    """Below one, in steps of 2**-23, and a prefix of any longer draw."""
    call = tf.function(primitives.uniform, jit_compile=True)
    longest = primitives.uniform([5, 6], shape=[1003]).numpy()
    assert longest.min() >= 0 and longest.max() < 1
    np.testing.assert_array_equal(longest * 2.0**23 % 1, 0)
    for count in (1, 2, 7, 1003):
        seed = tf.constant([5, 6])
        np.testing.assert_array_equal(
            call(seed, shape=[count]), longest[:count]
        )


def test_order_of_the_jitter_is_a_uniform_permutation():
    order = draws(4800)["order"]
    np.testing.assert_array_equal(
        np.sort(order, axis=1), np.tile(np.arange(4), (4800, 1))
    )
    counts = np.unique(order, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7  # 23 degrees, 99.9 %
