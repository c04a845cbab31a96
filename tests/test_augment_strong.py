import dataclasses
import importlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageFilter

from benchmarks import pillow_chain
from clsa_tf import config as config_lib
from clsa_tf.augment import chain, primitives, strong, views
from clsa_tf.augment.strong_ops import ARITHMETIC, STRONG_OPS, Op
from tests.marks import slow_but

# Compared with Pillow, to the bit.
pytestmark = pytest.mark.usefixtures("rewritten_graphs")

SIZES = [(1, 1), (2, 3), (33, 20), (3, 2), (5, 1), (16, 17), (64, 64)]
COUNT = 30  # images in every batch, so that each size is compiled once
# Grey values whose results under Pillow 13 are written out below.
ROW = [0, 1, 51, 52, 127, 128, 129, 200, 254, 255]

compiled = tf.function(strong.apply_one, jit_compile=True, autograph=False)
compiled_sequence = tf.function(strong.apply, jit_compile=True, autograph=False)


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


def planes(images):
    """[N,H,W,3] -> [N,3,H,W]."""
    return np.ascontiguousarray(np.moveaxis(images, -1, 1))


def rows_of(planes):
    """[N,3,H,W] -> [N,H,W,3]."""
    return np.moveaxis(np.asarray(planes), 1, -1)


def number(name):
    return strong.NAMES.index(name)


def every_case(height, width, levels, turns=1):
    """Each op, level and sign, shuffled; 5 turns cover every image."""
    images = np.stack(images_of(height, width))
    names = np.arange(len(strong.NAMES), dtype=np.int32)
    levels, signs = np.array(levels, np.int32), np.array([1, -1], np.int32)
    grid = np.meshgrid(names, signs, levels, indexing="ij")
    op, sign, level = [np.tile(x.ravel(), turns) for x in grid]
    image = np.arange(len(op)) + np.repeat(range(turns), len(op) // turns)
    order = np.random.default_rng(4).permutation(len(op))
    cases = images[image % len(images)], op, level, sign
    return [x[order] for x in cases]


def in_batches(call, images, op, level, sign):
    """Results of batches of COUNT images; the last one is filled up."""
    results = []
    for begin in range(0, len(images), COUNT):
        index = np.arange(begin, begin + COUNT) % len(images)
        batch = [planes(images[index]), op[index], level[index], sign[index]]
        results.append(rows_of(call(*map(tf.constant, batch))))
    return np.concatenate(results)[: len(images)]


def one_by_one(call, images, op, level, sign):
    cases = zip(planes(images), op, level, sign)
    rows = ([tf.constant(x[np.newaxis]) for x in case] for case in cases)
    return np.concatenate([rows_of(call(*row)) for row in rows])


RUNS = [one_by_one, in_batches]


def assert_equal_pillow(results, images, op, level, sign):
    assert results.dtype == np.uint8
    for result, image, *case in zip(results, images, op, level, sign):
        name = strong.NAMES[case[0]]
        expected = pillow_chain.op(name, image, *case[1:])
        np.testing.assert_array_equal(result, expected, err_msg=f"{name}{case}")


def row(values):
    """Grey values as a batch of one image, one pixel high: u8[1,3,1,W]."""
    return np.array(values, np.uint8)[None, None, None].repeat(3, axis=1)


def apply_op(name, images, level=100, sign=1):
    """One operation on u8[1,3,H,W], eagerly."""
    op, level, sign = ([x] for x in (number(name), level, sign))
    return strong.apply_one(tf.constant(images), op, level, sign).numpy()


def draws(count, num_ops=5, seed=23, **settings):
    uniform = primitives.uniform([seed, 0], shape=[4, count * num_ops])
    drawn = strong.draw(uniform, **settings)
    return {k: np.reshape(v, [count, num_ops]) for k, v in drawn.items()}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("height, width", slow_but(3, SIZES))
def test_every_op_equals_pillow(height, width, run):
    """Bit for bit, at every whole level and sign."""
    turns = 5 if run is in_batches and height < 64 else 1
    cases = every_case(height, width, range(100, 1000, 100), turns)
    # Compiling takes a second for each size.
    call = strong.apply_one if (height, width) == (3, 2) else compiled
    assert_equal_pillow(run(call, *cases), *cases)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (5, 1), (33, 20)])
def test_every_op_equals_pillow_between_the_levels(height, width, run):
    """The paper's levels, in hundredths."""
    levels = [0, 1, 33, 50, 249, 250, 251, 437, 499, 667, 750, 999, 1000]
    cases = every_case(height, width, levels)
    assert_equal_pillow(run(compiled, *cases), *cases)


@pytest.mark.parametrize(
    "name", [n for n, op in STRONG_OPS.items() if op.kind == "affine"]
)
@pytest.mark.parametrize(
    "height, width", slow_but(1, [(16, 17), (1, 1), (2, 3), (33, 20)])
)
def test_affine_ops_equal_pillow_at_every_hundredth(name, height, width):
    image = pillow_chain.photograph(height, width)
    levels = np.tile(np.arange(1001, dtype=np.int32), 2)
    signs = np.repeat(np.array([1, -1], np.int32), 1001)
    ops = np.full(2002, number(name), np.int32)
    cases = np.repeat(image[np.newaxis], 2002, axis=0), ops, levels, signs
    assert_equal_pillow(in_batches(compiled, *cases), *cases)


def test_each_pool_leaves_out_one_op():
    assert list(strong.NAMES) == sorted(pillow_chain.OPS)
    released, paper = strong.POOLS["released"], strong.POOLS["paper"]
    assert len(released) == len(paper) == 14
    assert set(strong.NAMES) - set(released) == {"Invert"}
    assert set(strong.NAMES) - set(paper) == {"Identity"}


@pytest.mark.parametrize(
    "name, level, values, expected",
    [
        ("Solarize", 500, ROW, [0, 1, 51, 52, 127, 127, 126, 55, 1, 0]),
        ("Posterize", 100, ROW, [0, 0, 48, 48, 112, 128, 128, 192, 240, 240]),
        (
            "AutoContrast",
            100,
            [20, 20, 45, 46, 83, 84, 84, 120, 147, 147],
            [0, 0, 50, 52, 126, 128, 128, 200, 255, 255],
        ),
        ("Brightness", 500, ROW, [0, 0, 25, 26, 63, 64, 64, 100, 127, 127]),
        (
            "Contrast",
            500,
            ROW,
            [60, 60, 85, 86, 123, 124, 124, 160, 187, 187],
        ),
        ("Equalize", 100, ROW, ROW),
        ("Invert", 0, ROW, [255, 254, 204, 203, 128, 127, 126, 55, 1, 0]),
        ("TranslateX", 400, ROW, [*ROW[1:], 0]),  # int(0.12 * 10) = 1 pixel
        ("TranslateX", 667, ROW, [*ROW[2:], 0, 0]),  # int(0.2001 * 10)
        ("Solarize", 250, ROW, [*ROW[:7], 55, 1, 0]),  # from 256 - 64 on
    ],
)
def test_grey_values_equal_golden_rows(name, level, values, expected):
    result = apply_op(name, row(values), level)
    np.testing.assert_array_equal(result, row(expected))


def test_color_equals_the_golden_value():
    """Luma 124 of (200, 100, 50), blended half and half."""
    pixel = np.array([200, 100, 50], np.uint8).reshape(1, 3, 1, 1)
    assert primitives.luma(pixel).numpy().item() == 124
    result = apply_op("Color", pixel, 500).ravel()  # 0.09 * 5 + 0.05 = 0.5
    np.testing.assert_array_equal(result, [162, 112, 87])


def test_enhancements_only_weaken():
    """The largest released factor of the four enhancements is .86."""
    white = np.full([1, 3, 2, 2], 255, np.uint8)
    levels = np.arange(1, 10)
    factors = levels * 0.09 + 0.05
    results = [
        apply_op("Brightness", white, 100 * v)[0, 0, 0, 0] for v in levels
    ]
    np.testing.assert_array_equal(results, np.floor(factors * 255 + 1e-4))


def test_affine_equals_pillow():
    image = pillow_chain.photograph(29, 40)
    rng = np.random.default_rng(2)
    random_matrices = rng.normal(0, 1, (40, 6)) * [1, 1, 9, 1, 1, 9]
    typical_matrices = [
        (1, 0.12, 0, 0, 1, 0),
        (1, 0, -3, 0, 1, 2),
        (-1, 0, 40, 0, 1, 0),
        (1, 0, 9000, 0, 1, 0),
    ]
    matrices = np.concatenate([random_matrices, typical_matrices])
    batch = planes(np.repeat(image[np.newaxis], len(matrices), axis=0))
    index = primitives.source_index(matrices, height=29, width=40)
    assert index.dtype == tf.int32 and index.shape == (44, 29, 40)
    results = rows_of(primitives.take(batch, index))
    for result, matrix in zip(results, matrices):
        expected = Image.fromarray(image).transform(
            (40, 29),
            Image.Transform.AFFINE,
            tuple(matrix),
            Image.Resampling.NEAREST,
        )
        np.testing.assert_array_equal(result, np.asarray(expected))


def test_translation_moves_content_to_the_left():
    shift = [[1, 0, 1, 0, 1, 0.0]]
    index = primitives.source_index(shift, height=1, width=3)
    np.testing.assert_array_equal(index, [[[1, 2, -1]]])
    result = primitives.take(row([1, 2, 3]), index)
    np.testing.assert_array_equal(result, row([2, 3, 0]))


@pytest.mark.parametrize("height, width", SIZES)
def test_smooth_equals_pillow(height, width):
    images = np.stack(images_of(height, width))
    results = rows_of(primitives.smooth(planes(images)))
    for image, result in zip(images, results):
        expected = Image.fromarray(image).filter(ImageFilter.SMOOTH)
        np.testing.assert_array_equal(result, np.asarray(expected))


def test_lookup_and_histogram_equal_pillow():
    images = np.stack(images_of(33, 20))
    rng = np.random.default_rng(5)
    tables = rng.integers(0, 256, (len(images), 3, 256), np.uint8)
    batch = planes(images)
    results = rows_of(primitives.lookup(batch, tables))
    counts = primitives.histogram(tf.constant(batch)).numpy()
    for i, image in enumerate(images):
        image = Image.fromarray(image)
        np.testing.assert_array_equal(
            results[i], np.asarray(image.point(tables[i].ravel().tolist()))
        )
        np.testing.assert_array_equal(counts[i].ravel(), image.histogram())
        alone = primitives.histogram(tf.constant(batch[i : i + 1]))
        np.testing.assert_array_equal(alone[0], counts[i])


def test_choose_runs_one_branch_for_one_image_and_selects_for_more():
    ran = []

    def branch(value):
        def call():
            ran.append(value)
            return tf.constant([[value, value]] * count)

        return call

    count, branches = 1, [branch(value) for value in (5, 6, 7)]
    result = primitives.choose(tf.constant([2]), branches)
    np.testing.assert_array_equal(result, [[7, 7]])
    assert ran == [7]
    count = 4
    result = primitives.choose(tf.constant([2, 0, 1, 0]), branches)
    np.testing.assert_array_equal(result[:, 0], [7, 5, 6, 5])


@pytest.mark.parametrize("run", slow_but(1, RUNS[::-1]))
def test_eager_map_and_compiled_agree(run):
    """Also with sizes that are unknown when traced."""
    cases = every_case(16, 17, [100, 437])
    expected = run(compiled, *cases)
    np.testing.assert_array_equal(run(strong.apply_one, *cases), expected)

    count = 1 if run is one_by_one else COUNT
    rows = tf.data.Dataset.from_tensor_slices((planes(cases[0]), *cases[1:]))
    rows = rows.batch(count, drop_remainder=True)
    for call in (strong.apply_one, compiled):
        mapped = list(rows.map(call).as_numpy_iterator())
        result = rows_of(np.concatenate(mapped))
        np.testing.assert_array_equal(result, expected)

    shape = tf.TensorSpec([count, 3, None, None], tf.uint8)
    scalar = tf.TensorSpec([count], tf.int32)
    signature = [shape, scalar, scalar, scalar]
    traced = tf.function(strong.apply_one, input_signature=signature)
    np.testing.assert_array_equal(run(traced, *cases), expected)


@pytest.mark.parametrize(
    "run, call, step",
    [
        (one_by_one, compiled, 11),
        (in_batches, compiled, 11),
        (in_batches, strong.apply_one, 55),
    ],
)
def test_auto_contrast_equals_pillow_for_every_range(run, call, step):
    low, high = np.triu_indices(256)
    values = np.arange(16 * 17)[np.newaxis, :, np.newaxis]
    pairs = [x[: len(x) // 3 * 3].reshape(-1, 1, 3) for x in (low, high)]
    pairs = [x[::step] for x in pairs]
    images = np.clip(values, *pairs).astype(np.uint8)  # [n,272,3]
    images = images.reshape(-1, 16, 17, 3)
    ops, unused = np.ones([2, len(images)], np.int32)
    ops[:] = number("AutoContrast")
    cases = images, ops, unused, unused
    assert_equal_pillow(run(call, *cases), *cases)


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("max_level", [10, 5, 2])
def test_draws_follow_the_released_code(max_level):
    count = 3000
    drawn = draws(count, max_level=max_level)
    assert all(value.shape == (count, 5) for value in drawn.values())
    # Levels 1..9 of 10, never 10; 99.9 % points of chi-square.
    assert (drawn["level"] % 100 == 0).all()
    levels = np.bincount(drawn["level"].ravel() // 100)
    assert levels[0] == 0 and len(levels) == max_level
    bound = {10: 26.1, 5: 16.3, 2: 1e-9}[max_level]
    assert chi_square(levels[1:], 5 * count / (max_level - 1)) < bound
    assert_ops_applications_and_signs(drawn, "Invert")


@pytest.mark.parametrize("max_level", [10, 5, 2])
def test_draws_follow_the_paper(max_level):
    drawn = draws(60000, pool="paper", max_level=max_level)
    # Every hundredth from 0 to the bound.
    levels = np.bincount(drawn["level"].ravel())
    assert len(levels) == 100 * max_level + 1
    bound = {10: 1143.9, 5: 602.7, 2: 266.5}[max_level]
    assert chi_square(levels, 300000 / len(levels)) < bound
    assert_ops_applications_and_signs(drawn, "Identity")


def assert_ops_applications_and_signs(drawn, absent):
    count = drawn["op"].size
    ops = np.bincount(drawn["op"].ravel(), minlength=15)
    assert len(ops) == 15 and ops[number(absent)] == 0
    ops = np.delete(ops, number(absent))
    assert chi_square(ops, count / 14) < 34.5  # 13 degrees, 99.9 %
    deviation = 0.5 / np.sqrt(count)
    assert abs(drawn["apply"].mean() - 0.5) < 3.3 * deviation
    assert set(np.unique(drawn["sign"])) == {-1, 1}
    assert abs((drawn["sign"] == -1).mean() - 0.5) < 3.3 * deviation


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-23])
@pytest.mark.parametrize("pool", strong.POOLS)
@pytest.mark.parametrize("max_level", [2, 7, 10])
def test_extreme_uniform_numbers_give_extreme_draws(uniform, pool, max_level):
    numbers = tf.fill([4, 1], uniform)
    drawn = strong.draw(numbers, pool=pool, max_level=max_level)
    names = strong.POOLS[pool]
    ends = (
        (0, 100 * max_level)
        if pool == "paper"
        else (100, 100 * (max_level - 1))
    )
    last = uniform > 0
    assert strong.NAMES[drawn["op"][0]] == names[-1 if last else 0]
    assert drawn["level"][0] == ends[last]
    assert bool(drawn["apply"][0]) != last
    assert drawn["sign"][0] == (1 if last else -1)


@pytest.mark.parametrize("pool", strong.POOLS)
def test_host_and_compiled_draws_agree(pool):
    draw = tf.function(strong.draw, jit_compile=True)
    uniform = primitives.uniform([3, 3], shape=[4, 5000])
    compiled_draw = draw(uniform, pool=pool, max_level=7)
    eager = strong.draw(uniform, pool=pool, max_level=7)
    for name, value in eager.items():
        np.testing.assert_array_equal(compiled_draw[name], value)


def test_draws_are_independent_and_with_replacement():
    drawn = draws(3000)
    # All five differ with probability 14*13*12*11*10 / 14**5 = 0.447.
    distinct = [len(set(ops)) == 5 for ops in drawn["op"]]
    assert abs(np.mean(distinct) - 0.447) < 0.03
    # Nothing is applied with probability 1/32, 2.5 operations on average.
    applied = drawn["apply"].sum(axis=1)
    counts = np.bincount(applied, minlength=6)
    binomial = 3000 * np.array([1, 5, 10, 10, 5, 1]) / 32
    assert chi_square(counts, binomial) < 20.5
    columns = [drawn[k].ravel() for k in ("op", "level", "apply", "sign")]
    correlation = np.corrcoef(np.array(columns, float))
    assert np.abs(correlation - np.eye(4)).max() < 0.03


@pytest.mark.parametrize("pool", slow_but(1, strong.POOLS))
def test_sequence_equals_pillow_eager_mapped_and_compiled(pool):
    image = pillow_chain.photograph(40, 31)
    images = tf.constant(planes(np.repeat(image[np.newaxis], 60, axis=0)))
    drawn = draws(60, pool=pool)
    selected = rows_of(compiled_sequence(images, drawn))

    rows = tf.data.Dataset.from_tensor_slices((images, drawn)).batch(1, True)
    mapped = list(rows.map(strong.apply).as_numpy_iterator())
    unchanged = 0
    for i, (batch, params) in enumerate(rows):
        expected = pillow_chain.strong(
            image, {k: v[i] for k, v in drawn.items()}
        )
        switched = compiled_sequence(batch, params)
        np.testing.assert_array_equal(rows_of(switched)[0], expected)
        np.testing.assert_array_equal(rows_of(mapped[i])[0], expected)
        np.testing.assert_array_equal(selected[i], expected)
        if i < 5:
            eager = strong.apply(batch, params)
            np.testing.assert_array_equal(rows_of(eager)[0], expected)
        unchanged += np.array_equal(expected, image)
    assert unchanged < 12


@pytest.mark.parametrize("count", [1, 3])
def test_only_applied_ops_change_an_image(count):
    image = pillow_chain.photograph(12, 12)
    images = planes(np.stack([image] * count))
    params = {
        "op": [[number("Solarize")] * 2] * count,
        "level": [[500, 900]] * count,
        "apply": [[False, False]] * count,
        "sign": [[1, 1]] * count,
    }
    params = tf.nest.map_structure(
        tf.constant, {k: np.array(v) for k, v in params.items()}
    )
    result = strong.apply(tf.constant(images), params)
    np.testing.assert_array_equal(result, images)
    once = [[False, False]] * (count - 1) + [[True, False]]
    params["apply"] = tf.constant(once)
    result = rows_of(strong.apply(tf.constant(images), params))
    changed = pillow_chain.op("Solarize", image, 500, 1)
    np.testing.assert_array_equal(result, [image] * (count - 1) + [changed])


def test_describe_lists_applied_ops_with_their_values():
    names = [
        ("Rotate", 400, -1, True),
        ("ShearX", 900, 1, False),
        ("ShearY", 300, 1, True),
        ("TranslateX", 400, -1, True),
        ("Posterize", 500, 1, True),
        ("Solarize", 900, 1, True),
        ("Contrast", 100, 1, True),
        ("Equalize", 100, 1, True),
        ("Rotate", 437, 1, True),
        ("Invert", 100, 1, True),
    ]
    ops, levels, signs, applied = zip(*names)
    params = {
        "op": [number(name) for name in ops],
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
        "Rotate +13.11°",
        "Invert",
    ]


@pytest.fixture
def halve(monkeypatch):
    """Another operation in the registry, alone in a pool of its own."""

    def function(images, level):
        del level
        return images // 2

    op = Op(ARITHMETIC, function, lambda level, _: f"{level}", ("halves",))
    monkeypatch.setitem(STRONG_OPS, "Halve", op)
    importlib.reload(strong)
    yield
    monkeypatch.undo()
    importlib.reload(strong)


def test_an_entry_in_the_registry_is_an_operation(halve):
    config = config_lib.parse(
        [
            "--method=clsa",
            "--ddm_weight=1",
            "--strong_pool=halves",
            "--strong_ops=3",
            "--strong_crops=9:1:1",
            "--blur=0",
        ]
    )
    (view,) = config.options.strong_views()
    weak = dataclasses.replace(view, name="weak", strong_ops=0)
    drawn = views.draw([1, 2], [9, 9], views=[view])[view.name]
    cut = pillow_chain.photograph(9, 9).transpose(0, 2, 1)

    def completed(view, params):
        packed = views.pack({view.name: params})
        crops, packed = {view.name: cut[np.newaxis]}, {view.name: [packed]}
        return chain.complete(crops, packed, views=[view])[view.name]

    sequence = drawn.pop("strong")
    times = int(np.sum(sequence["apply"]))
    assert 0 < times < 3
    np.testing.assert_array_equal(
        completed(view, drawn | {"strong": sequence}),
        completed(weak, drawn) // 2**times,
    )
    words = strong.describe(sequence)
    assert len(words) == times and words[0].startswith("Halve ")
