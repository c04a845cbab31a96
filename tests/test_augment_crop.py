import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from benchmarks import pillow_chain
from clsa_tf.augment import crop, primitives

# Compared with Pillow, to the bit.
pytestmark = pytest.mark.usefixtures("rewritten_graphs")


def draw_boxes(count, height, width, min_area, max_area, seed=3):
    def draw(uniform):
        return crop.draw_box(
            uniform,
            height=height,
            width=width,
            min_area=min_area,
            max_area=max_area,
        )

    uniform = primitives.uniform([seed, 0], shape=[count, crop.NUM_UNIFORMS])
    rows = tf.data.Dataset.from_tensor_slices(uniform)
    return next(iter(rows.map(draw).batch(count))).numpy()


def resize_boxes(image, boxes, *sizes):
    """Returns uint8 `[size, size, 3]` for each size."""
    boxes = np.array(boxes)[np.newaxis]
    results = [
        rectangle.resize()
        for (rectangle,) in crop.rectangles([image], boxes, sizes=sizes)
    ]
    for size, result in zip(sizes, results):
        assert result.dtype == tf.uint8 and result.shape == (size, 3, size)
    return [result.numpy().transpose(2, 0, 1) for result in results]


def test_to_bytes_rounds_half_up():
    result = crop.to_bytes(tf.constant([0.0, 0.4, 0.5, 1.5, 254.5, 255.0]))
    assert result.dtype == tf.uint8
    np.testing.assert_array_equal(result, [0, 0, 1, 2, 255, 255])


def uniform_chi_square(values, bins):
    """Statistic of values in [0, 1] against the uniform distribution."""
    # Rounding to whole pixels may leave the range slightly.
    assert values.min() > -0.005 and values.max() < 1.005
    counts = np.histogram(np.clip(values, 0, 1), bins, (0.0, 1.0))[0]
    expected = len(values) / bins
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize(
    "height, width",
    [(1, 1), (1, 2), (2, 1), (2, 3), (1, 60), (60, 1), (9, 100), (224, 224)],
)
@pytest.mark.parametrize("areas", [(0.2, 1.0), (0.086, 0.429), (1.0, 1.0)])
def test_boxes_lie_inside_the_image(height, width, areas):
    top, left, h, w = draw_boxes(100, height, width, *areas).T
    assert (h >= 1).all() and (w >= 1).all()
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_area_and_aspect_have_torchvision_s_distributions():
    # At most 30 % of a large square always fits at the first try.
    boxes = draw_boxes(4000, 3000, 3000, 0.1, 0.3).astype(float)
    area = boxes[:, 2] * boxes[:, 3] / 3000**2
    aspect = np.log(boxes[:, 3] / boxes[:, 2]) / math.log(4 / 3)
    # 99.9 % point of chi-square with 19 degrees of freedom.
    assert uniform_chi_square((area - 0.1) / 0.2, 20) < 43.8
    assert uniform_chi_square((aspect + 1) / 2, 20) < 43.8
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.06


def test_corner_is_uniform_over_all_positions():
    # In an image one pixel high, each 1x1 crop occurs equally often.
    boxes = draw_boxes(2000, 1, 5, 0.2, 0.2)
    assert (boxes[:, 2:] == 1).all()
    counts = np.bincount(boxes[:, 1], minlength=5)
    assert ((counts - 400) ** 2 / 400).sum() < 18.5  # 4 degrees, 99.9 %


def test_a_later_attempt_is_taken_when_the_first_does_not_fit():
    # Few aspect ratios fit. Still, one of the ten attempts nearly always
    # finds a crop, so that the fallback is rare.
    boxes = draw_boxes(300, 40, 50, 0.9, 1.0)
    assert len(np.unique(boxes, axis=0)) > 20
    area = boxes[:, 2] * boxes[:, 3] / 2000
    assert np.mean(area >= 0.85) > 0.9


@pytest.mark.parametrize(
    "height, width, box",
    [
        (10, 100, (0, 43, 10, 13)),
        (100, 10, (43, 0, 13, 10)),
        (9, 50, (0, 19, 9, 12)),
        (50, 3, (23, 0, 4, 3)),
    ],
)
def test_fallback_is_central(height, width, box):
    # A crop of 90 % of such a long image never has an aspect ratio below 4/3.
    boxes = draw_boxes(20, height, width, 0.9, 1.0)
    np.testing.assert_array_equal(boxes, np.tile(box, (20, 1)))


BOXES = [
    (31, 47, (0, 0, 31, 47)),
    (31, 47, (3, 5, 17, 40)),
    (31, 47, (30, 46, 1, 1)),
    (64, 64, (10, 12, 50, 41)),
    (200, 150, (7, 20, 180, 111)),
    (48, 48, (0, 0, 48, 48)),
    (1, 1, (0, 0, 1, 1)),
    (2, 3, (0, 0, 2, 3)),
]


@pytest.mark.parametrize("height, width, box", BOXES)
@pytest.mark.parametrize("noise", [False, True])
def test_resize_boxes_is_within_one_of_pillow(height, width, box, noise):
    image = pillow_chain.photograph(height, width)
    if noise:  # the hardest case: every pixel 0 or 255
        image = (image % 2) * np.uint8(255)
    sizes = (1, 16, 48, 96)
    results = resize_boxes(image, np.int32([box] * 4), *sizes)
    for size, result in zip(sizes, results):
        expected = pillow_chain.resize_box(image, box, size)
        difference = np.abs(result.astype(int) - expected)
        assert difference.max() <= 1
        if (height, width) == (size, size) and box[2:] == (size, size):
            assert difference.max() == 0
    of_floats = resize_boxes(image, np.float32([box] * 4), *sizes)
    for result, other in zip(results, of_floats):
        np.testing.assert_array_equal(result, other)


def test_boxes_are_resized_independently():
    image = pillow_chain.photograph(61, 80)
    boxes, sizes = float_boxes(61, 80, 6), (16, 24, 16, 9, 32, 24)
    together = resize_boxes(image, boxes, *sizes)
    for box, size, result in zip(boxes, sizes, together):
        alone = resize_boxes(image, box[np.newaxis], size)[0]
        np.testing.assert_array_equal(result, alone)


def test_images_are_resized_independently():
    """Three images of different sizes, two views of each."""
    images = [pillow_chain.photograph(9 + i, 14, seed=i) for i in range(3)]
    boxes = np.array(
        [[[i, 2, 5, 7 + i], [1 + i, i, 6, 8]] for i in range(3)], np.int32
    )
    together = crop.rectangles(images, boxes, sizes=[4, 6])
    assert [len(row) for row in together] == [3, 3]
    for i, image in enumerate(images):
        alone = crop.rectangles([image], boxes[i : i + 1], sizes=[4, 6])
        for row, (rectangle,) in zip(together, alone):
            np.testing.assert_array_equal(row[i].resize(), rectangle.resize())


def float_boxes(height, width, count=20):
    """(top, left, height, width), f32[count,4], within the image."""
    rng = np.random.default_rng(6)
    sides = rng.uniform(0.2, 1.0, [count, 2]) * [height, width]
    corner = rng.uniform(0, 1, [count, 2]) * ([height, width] - sides)
    boxes = np.concatenate([corner, sides], axis=1)
    # Decoding at an eighth of the size gives multiples of 1/8.
    boxes[::2] = np.floor(boxes[::2] * 8) / 8
    return boxes.astype(np.float32)


def pillow_resize(image, box, size):
    """box is (top, left, height, width), in fractions of pixels."""
    top, left, height, width = (float(x) for x in box)
    right, bottom = left + width, top + height
    bilinear = Image.Resampling.BILINEAR
    edges = (left, top, right, bottom)
    return np.asarray(
        Image.fromarray(image).resize((size, size), bilinear, box=edges)
    )


@pytest.mark.parametrize("height, width", [(61, 80), (200, 150), (9, 7)])
def test_resize_of_fractional_boxes_is_within_one_of_pillow(height, width):
    """Pillow, too, gets only the pixels that the box touches."""
    image = pillow_chain.photograph(height, width)
    sizes = (1, 16, 48, 96)
    for box in float_boxes(height, width):
        top, left = np.floor(box[:2]).astype(int)
        bottom, right = np.ceil(box[:2] + box[2:]).astype(int)
        cut = image[top:bottom, left:right]
        inner = np.r_[box[:2] - [top, left], box[2:]]
        for size, result in zip(sizes, resize_boxes(image, [box] * 4, *sizes)):
            expected = pillow_resize(cut, inner, size)
            assert np.abs(result.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("height, width", [(61, 80), (200, 150)])
def test_resize_reads_no_pixels_outside_the_box(height, width):
    """Given the whole image, Pillow does: at the edge results differ.

    Inside, where the filter does not cross the edge of the box, they differ by
    1/255 at most. At the edge the difference depends on the image: it is up to
    23/255 on these photographs, and below 0.4/255 on average over a crop.
    """
    image = pillow_chain.photograph(height, width)
    sizes, largest = (16, 48, 96), 0
    for box in float_boxes(height, width):
        for size, result in zip(sizes, resize_boxes(image, [box] * 3, *sizes)):
            expected = pillow_resize(image, box, size)
            difference = np.abs(result.astype(int) - expected)
            # Pixels of the result from the edge, down and across.
            down, across = np.ceil(np.maximum(size / box[2:], 1) - 0.5)
            down, across = int(down), int(across)
            inside = difference[down : size - down, across : size - across]
            assert inside.size and inside.max() <= 1
            assert difference.max() <= 25 and difference.mean() < 0.4
            largest = max(largest, difference.max())
    assert largest > 1


@pytest.mark.parametrize(
    "height, width", [(60, 80), (80, 61), (33, 33), (1, 1), (5, 31), (48, 20)]
)
@pytest.mark.parametrize(
    "size, crop_ratio, short", [(32, 0.875, 37), (31, 0.875, 35), (32, 1.0, 32)]
)
def test_central_is_within_one_of_pillow(
    height, width, size, crop_ratio, short
):
    image = pillow_chain.photograph(height, width)
    result = crop.central(image, size=size, crop_ratio=crop_ratio).numpy()
    expected = pillow_chain.central(image, size, short)
    assert result.shape == (size, size, 3)
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_eager_map_and_function_agree():
    image = tf.constant(pillow_chain.photograph(37, 52))
    flexible = tf.TensorSpec([None, None, 3], tf.uint8)

    def both(image):
        size = tf.shape(image)
        box = crop.draw_box(
            primitives.uniform([5, 8], shape=[crop.NUM_UNIFORMS]),
            height=size[0],
            width=size[1],
            min_area=0.2,
            max_area=1.0,
        )
        part = tf.cast(box, tf.float32) + [0.2, 0.3, -0.4, -0.4]
        boxes = tf.stack([tf.cast(box, tf.float32), part])
        both_sizes = crop.rectangles([image], boxes[tf.newaxis], sizes=[24, 16])
        resized = [rectangle.resize() for (rectangle,) in both_sizes]
        return box, *resized, crop.central(image, size=24, crop_ratio=0.875)

    eager = both(image)
    mapped = next(iter(tf.data.Dataset.from_tensors(image).map(both)))
    traced = tf.function(both, input_signature=[flexible])(image)
    assert len(eager) == len(mapped) == len(traced) == 4
    for one, two, three in zip(eager, mapped, traced):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
