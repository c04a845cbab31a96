import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageFilter

from clsa_tf.augment import primitives, strong, views
from tests import pillow_chain

SIZES = [(1, 1), (2, 3), (3, 2), (5, 1), (16, 17), (33, 20), (96, 96)]
LEVELS = np.repeat(np.arange(1, 10, dtype=np.int32), 2)
SIGNS = np.tile(np.array([1, -1], np.int32), 9)
# Grey values whose results under Pillow 13 are written out below.
ROW = [0, 1, 51, 52, 127, 128, 129, 200, 254, 255]


def images_of(height, width):
    """Photograph, grey values, flat channels, few levels, pure noise."""
    image = pillow_chain.photograph(height, width, seed=width)
    flat = image.copy()
    flat[..., 0], flat[..., 2] = 77, 255
    noise = np.random.default_rng(height).integers(0, 256, image.shape)
    return [
        image,
        image[..., [1, 1, 1]],
        flat,
        image // 64 * 50 + 30,
        noise.astype(np.uint8),
    ]


def row(values):
    """Grey values as a batch of one image, one pixel high."""
    return np.array(values, np.uint8)[None, None, :, None].repeat(3, axis=3)


def op(name, images, level=1, sign=1):
    return strong.OPS[name](images, tf.constant([level]), tf.constant([sign]))


def draws(count, num_ops=5, seed=23):
    seeds = tf.data.Dataset.range(count, output_type=tf.int32)
    drawn = seeds.map(
        lambda i: strong.draw(tf.stack([seed, i]), num_ops=num_ops)
    )
    drawn = next(iter(drawn.batch(count)))
    return {name: value.numpy() for name, value in drawn.items()}


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("name", strong.NAMES)
def test_op_equals_pillow(name, height, width):
    """Bit for bit, at every level and sign, each image with its own."""
    for image in images_of(height, width):
        batch = tf.constant(np.repeat(image[np.newaxis], 18, axis=0))
        results = strong.OPS[name](batch, LEVELS, SIGNS)
        assert results.dtype == tf.uint8
        for result, level, sign in zip(results.numpy(), LEVELS, SIGNS):
            expected = pillow_chain.op(name, image, level, sign)
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("name", strong.NAMES)
def test_ops_of_a_batch_do_not_mix(name):
    batch = np.stack(images_of(16, 17))
    levels = np.array([9, 2, 5, 1, 7], np.int32)
    signs = np.array([1, -1, -1, 1, 1], np.int32)
    results = strong.OPS[name](tf.constant(batch), levels, signs).numpy()
    for image, result, level, sign in zip(batch, results, levels, signs):
        expected = pillow_chain.op(name, image, level, sign)
        np.testing.assert_array_equal(result, expected)


def test_names_are_the_released_pool():
    assert sorted(strong.NAMES) == sorted(pillow_chain.OPS)
    assert len(strong.NAMES) == 14


@pytest.mark.parametrize(
    "name, level, values, expected",
    [
        ("Solarize", 5, ROW, [0, 1, 51, 52, 127, 127, 126, 55, 1, 0]),
        ("Posterize", 1, ROW, [0, 0, 48, 48, 112, 128, 128, 192, 240, 240]),
        (
            "AutoContrast",
            1,
            [20, 20, 45, 46, 83, 84, 84, 120, 147, 147],
            [0, 0, 50, 52, 126, 128, 128, 200, 255, 255],
        ),
        ("Brightness", 5, ROW, [0, 0, 25, 26, 63, 64, 64, 100, 127, 127]),
        (
            "Contrast",
            5,
            ROW,
            [60, 60, 85, 86, 123, 124, 124, 160, 187, 187],
        ),
        ("Equalize", 1, ROW, ROW),
        ("TranslateX", 4, ROW, [*ROW[1:], 0]),  # int(0.12 * 10) = 1 pixel
    ],
)
def test_golden_row(name, level, values, expected):
    result = op(name, row(values), level).numpy()
    np.testing.assert_array_equal(result, row(expected))


def test_golden_colour():
    """Luma 124 of (200, 100, 50), blended half and half."""
    pixel = np.array([200, 100, 50], np.uint8).reshape(1, 1, 1, 3)
    assert primitives.to_gray(pixel).numpy().item() == 124
    result = op("Color", pixel, 5).numpy().ravel()  # 0.09 * 5 + 0.05 = 0.5
    np.testing.assert_array_equal(result, [162, 112, 87])


def test_enhancements_only_weaken():
    """The largest factor of Brightness, Color, Contrast, Sharpness is .86."""
    white = np.full([9, 2, 2, 3], 255, np.uint8)
    levels = np.arange(1, 10, dtype=np.int32)
    result = strong.OPS["Brightness"](white, levels, levels)[:, 0, 0, 0]
    factors = levels * 0.09 + 0.05
    assert factors.max() == pytest.approx(0.86)
    np.testing.assert_array_equal(result, np.floor(factors * 255 + 1e-4))


@pytest.mark.parametrize("degrees", [0, 1, -1, 45, 90, 180, 270, -90, 360, 723])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (16, 16), (17, 24)])
def test_rotate_equals_pillow(degrees, height, width):
    image = pillow_chain.photograph(height, width)
    result = primitives.rotate(image[np.newaxis], [degrees])[0]
    expected = np.asarray(Image.fromarray(image).rotate(degrees))
    np.testing.assert_array_equal(result, expected)


def test_affine_equals_pillow():
    image = pillow_chain.photograph(29, 40)
    rng = np.random.default_rng(2)
    wild = rng.normal(0, 1, (40, 6)) * [1, 1, 9, 1, 1, 9]
    tame = [
        (1, 0.12, 0, 0, 1, 0),
        (1, 0, -3, 0, 1, 2),
        (1, 0, 0.4999999, 0, 1, 0.4999999),  # fixed point would round these up
        (0.5, 0, 3.3, 0, 0.7, -1.2),
        (-1, 0, 40, 0, 1, 0),
        (1, 0, 9000, 0, 1, 0),
    ]
    matrices = np.concatenate([wild, tame])
    batch = np.repeat(image[np.newaxis], len(matrices), axis=0)
    results = primitives.affine_nearest(batch, matrices).numpy()
    for result, matrix in zip(results, matrices):
        expected = Image.fromarray(image).transform(
            (40, 29),
            Image.Transform.AFFINE,
            tuple(matrix),
            Image.Resampling.NEAREST,
        )
        np.testing.assert_array_equal(result, np.asarray(expected))


def test_translation_moves_content_to_the_left():
    result = primitives.affine_nearest(row([1, 2, 3]), [[1, 0, 1, 0, 1, 0.0]])
    np.testing.assert_array_equal(result, row([2, 3, 0]))


@pytest.mark.parametrize("height, width", SIZES)
def test_smooth_equals_pillow(height, width):
    for image in images_of(height, width):
        expected = Image.fromarray(image).filter(ImageFilter.SMOOTH)
        result = primitives.smooth(image[np.newaxis])[0]
        np.testing.assert_array_equal(result, np.asarray(expected))


def test_lookup_and_histogram_equal_pillow():
    images = np.stack(images_of(33, 20))
    rng = np.random.default_rng(5)
    tables = rng.integers(0, 256, (len(images), 3, 256), np.uint8)
    results = primitives.lookup(images, tables).numpy()
    counts = primitives.histogram(images).numpy()
    for i, image in enumerate(images):
        image = Image.fromarray(image)
        np.testing.assert_array_equal(
            results[i], np.asarray(image.point(tables[i].ravel().tolist()))
        )
        np.testing.assert_array_equal(counts[i].ravel(), image.histogram())


@pytest.mark.parametrize("name", strong.NAMES)
def test_eager_map_and_function_agree(name):
    image = tf.constant(pillow_chain.photograph(24, 31))
    levels, signs = tf.constant(LEVELS), tf.constant(SIGNS)

    def one(level, sign):
        return op_of_one(image, level, sign)

    def op_of_one(image, level, sign):
        return strong.OPS[name](image[None], level[None], sign[None])[0]

    flexible = tf.TensorSpec([None, None, 3], tf.uint8)
    scalar = tf.TensorSpec([], tf.int32)
    traced = tf.function(op_of_one, input_signature=[flexible, scalar, scalar])
    rows = tf.data.Dataset.from_tensor_slices((levels, signs))
    mapped = np.stack(list(rows.map(one).as_numpy_iterator()))
    for result, level, sign in zip(mapped, levels, signs):
        np.testing.assert_array_equal(result, one(level, sign))
        np.testing.assert_array_equal(result, traced(image, level, sign))


@pytest.mark.parametrize("name", strong.NAMES)
def test_op_can_be_compiled(name):
    """XLA gives the same bytes: no op without a kernel, no fused rounding."""
    batch = np.stack(images_of(20, 20)).repeat(18, axis=0)
    batch = tf.constant(batch)
    levels, signs = [tf.tile(x, [5]) for x in (LEVELS, SIGNS)]
    compiled = tf.function(strong.OPS[name], jit_compile=True)
    np.testing.assert_array_equal(
        compiled(batch, levels, signs), strong.OPS[name](batch, levels, signs)
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_auto_contrast_equals_pillow_for_every_range(compiled):
    low, high = np.triu_indices(256)
    rows = np.arange(256)[np.newaxis, :, np.newaxis]
    pairs = [x[: len(x) // 3 * 3].reshape(-1, 1, 3) for x in (low, high)]
    images = np.clip(rows, *pairs).astype(np.uint8)[:, np.newaxis]
    call = tf.function(strong.OPS["AutoContrast"], jit_compile=compiled)
    unused = tf.ones([len(images)], tf.int32)
    results = call(tf.constant(images), unused, unused).numpy()
    for i in range(0, len(images), 11):
        expected = pillow_chain.op("AutoContrast", images[i], 1, 1)
        np.testing.assert_array_equal(results[i], expected)


def test_draws_are_those_of_the_released_code():
    count = 3000
    drawn = draws(count)
    assert all(value.shape == (count, 5) for value in drawn.values())
    # Levels 1..9, never 10; 99.9 % points of chi-square.
    levels = np.bincount(drawn["level"].ravel(), minlength=11)
    assert levels[0] == 0 and levels[10] == 0 and len(levels) == 11
    expected = 5 * count / 9
    assert ((levels[1:10] - expected) ** 2 / expected).sum() < 26.1
    ops = np.bincount(drawn["op"].ravel(), minlength=14)
    expected = 5 * count / 14
    assert len(ops) == 14
    assert ((ops - expected) ** 2 / expected).sum() < 34.5
    deviation = 0.5 / np.sqrt(5 * count)
    assert abs(drawn["apply"].mean() - 0.5) < 3.3 * deviation
    assert set(np.unique(drawn["sign"])) == {-1, 1}
    assert abs((drawn["sign"] == -1).mean() - 0.5) < 3.3 * deviation


def test_host_and_compiled_draws_agree():
    draw = tf.function(strong.draw, jit_compile=True)
    for i in range(20):
        compiled = draw(tf.constant([i, 3]), num_ops=5)
        for name, value in strong.draw([i, 3], num_ops=5).items():
            np.testing.assert_array_equal(compiled[name], value)


def test_draws_are_independent_and_with_replacement():
    drawn = draws(3000)
    # All five differ with probability 14*13*12*11*10 / 14**5 = 0.447.
    distinct = [len(set(ops)) == 5 for ops in drawn["op"]]
    assert abs(np.mean(distinct) - 0.447) < 0.03
    # Nothing is applied with probability 1/32, 2.5 operations on average.
    applied = drawn["apply"].sum(axis=1)
    counts = np.bincount(applied, minlength=6)
    binomial = 3000 * np.array([1, 5, 10, 10, 5, 1]) / 32
    assert ((counts - binomial) ** 2 / binomial).sum() < 20.5
    columns = [drawn[k].ravel() for k in ("op", "level", "apply", "sign")]
    correlation = np.corrcoef(np.array(columns, float))
    assert np.abs(correlation - np.eye(4)).max() < 0.03


def test_sequence_equals_pillow_in_every_way_to_run_it():
    image = tf.constant(pillow_chain.photograph(40, 31))

    def sequence(i):
        params = strong.draw(tf.stack([i, 1]), num_ops=5)
        return params, strong.apply(image, params)

    seeds = tf.data.Dataset.range(100, output_type=tf.int32)
    traced = tf.function(sequence)
    unchanged = 0
    for i, (params, result) in enumerate(seeds.map(sequence)):
        expected = pillow_chain.strong(image.numpy(), params)
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(traced(tf.constant(i))[1], expected)
        if i < 10:
            np.testing.assert_array_equal(sequence(tf.constant(i))[1], expected)
        unchanged += np.array_equal(result, image)
    assert unchanged < 20


def test_only_what_is_applied_is_executed():
    image = pillow_chain.photograph(12, 12)
    params = {
        "op": [strong.NAMES.index("Solarize")] * 2,
        "level": [5, 9],
        "apply": [False, False],
        "sign": [1, 1],
    }
    np.testing.assert_array_equal(strong.apply(image, params), image)
    params["apply"] = [True, False]
    np.testing.assert_array_equal(
        strong.apply(image, params),
        pillow_chain.op("Solarize", image, 5, 1),
    )


def test_describe():
    names = [
        ("Rotate", 4, -1, True),
        ("ShearX", 9, 1, False),
        ("ShearY", 3, 1, True),
        ("TranslateX", 4, -1, True),
        ("Posterize", 5, 1, True),
        ("Solarize", 9, 1, True),
        ("Contrast", 1, 1, True),
        ("Equalize", 1, 1, True),
    ]
    ops, levels, signs, applied = zip(*names)
    params = {
        "op": [strong.NAMES.index(name) for name in ops],
        "level": tf.constant(levels),
        "sign": np.array(signs),
        "apply": applied,
    }
    assert strong.describe(params) == [
        "Rotate -12°",
        "ShearY +0.09",
        "TranslateX -12%",
        "Posterize 6 bits",
        "Solarize 26",
        "Contrast 0.14",
        "Equalize",
    ]


VIEW = views.View("strong", 24, min_area=0.2, max_area=0.9, strong_ops=5)


def test_a_view_is_a_function_of_its_seed():
    image = tf.constant(pillow_chain.photograph(50, 61))

    def make(i):
        seed = tf.stack([7, i])
        return views.make_view(image, seed, view=VIEW)

    seeds = tf.data.Dataset.range(20, output_type=tf.int32)
    mapped = np.stack(list(seeds.map(make).as_numpy_iterator()))
    again = np.stack(list(seeds.map(make, 2).as_numpy_iterator()))
    np.testing.assert_array_equal(mapped, again)
    np.testing.assert_array_equal(mapped[3], make(tf.constant(3)))
    assert mapped.shape == (20, 24, 24, 3)
    assert len({view.tobytes() for view in mapped}) == 20


@pytest.mark.parametrize("height, width", [(48, 33), (1, 1), (2, 3)])
def test_view_is_crop_then_weak_then_strong(height, width):
    """Equal to Pillow's chain from the crop on; crops may differ by one."""
    image = pillow_chain.photograph(height, width)
    chain = tf.function(lambda x, p: views.apply_view(x, p, view=VIEW))
    for i in range(25):
        params = views.draw_view([i, 6], view=VIEW, height=height, width=width)
        # The box is cut beforehand, at its final size: the resize is then
        # exact and what is left to compare is the chain.
        cut = pillow_chain.resize_box(image, params["box"].numpy(), 24)
        params["box"] = tf.constant([0, 0, 24, 24])
        expected = pillow_chain.view(cut, params, VIEW.size)
        result = chain(tf.constant(cut), params)
        np.testing.assert_array_equal(result, expected)
