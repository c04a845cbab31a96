import math

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.augment import crop, views
from clsa_tf.errors import UserError
from tests import pillow_chain


def draw_boxes(count, height, width, min_area, max_area, seed=3):
    def draw(i):
        return crop.draw_box(
            tf.stack([seed, i]),
            height=height,
            width=width,
            min_area=min_area,
            max_area=max_area,
        )

    seeds = tf.data.Dataset.range(count, output_type=tf.int32)
    return next(iter(seeds.map(draw).batch(count))).numpy()


def uniform_chi_square(values, bins):
    """Statistic of values in [0, 1] against the uniform distribution."""
    # Rounding to whole pixels may lead out of the range, but not far.
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


def test_corner_is_uniform_over_all_places():
    # One pixel high or wide: each place of a 1x1 crop occurs equally often.
    boxes = draw_boxes(2000, 1, 5, 0.2, 0.2)
    assert (boxes[:, 2:] == 1).all()
    counts = np.bincount(boxes[:, 1], minlength=5)
    assert ((counts - 400) ** 2 / 400).sum() < 18.5  # 4 degrees, 99.9 %


def test_a_later_try_is_taken_when_the_first_does_not_fit():
    # The whole area fits only as a square, which rounding makes possible:
    # nearly every crop is found by one of the ten tries, not the fallback.
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
    # 90 % of so long an image never has an aspect ratio below 4/3.
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
@pytest.mark.parametrize("size", [1, 16, 48, 96])
@pytest.mark.parametrize("noise", [False, True])
def test_resize_box_is_within_one_of_pillow(height, width, box, size, noise):
    image = pillow_chain.photograph(height, width)
    if noise:  # the hardest case: every pixel 0 or 255
        image = (image % 2) * np.uint8(255)
    result = crop.resize_box(image, np.array(box, np.int32), size=size)
    expected = pillow_chain.resize_box(image, box, size)
    assert result.dtype == tf.uint8 and result.shape == (size, size, 3)
    difference = np.abs(result.numpy().astype(int) - expected)
    assert difference.max() <= 1
    if (height, width) == (size, size) and box[2:] == (size, size):
        assert difference.max() == 0


@pytest.mark.parametrize(
    "height, width", [(60, 80), (80, 61), (33, 33), (1, 1), (5, 31), (48, 20)]
)
@pytest.mark.parametrize(
    "size, keep, short", [(32, 0.875, 37), (31, 0.875, 35), (32, 1.0, 32)]
)
def test_central_is_within_one_of_pillow(height, width, size, keep, short):
    image = pillow_chain.photograph(height, width)
    result = crop.central(image, size=size, keep=keep).numpy()
    expected = pillow_chain.central(image, size, short)
    assert result.shape == (size, size, 3)
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_eager_map_and_function_agree():
    image = tf.constant(pillow_chain.photograph(37, 52))
    flexible = tf.TensorSpec([None, None, 3], tf.uint8)

    def both(image):
        size = tf.shape(image)
        box = crop.draw_box(
            [5, 8],
            height=size[0],
            width=size[1],
            min_area=0.2,
            max_area=1.0,
        )
        resized = crop.resize_box(image, box, size=24)
        return box, resized, crop.central(image, size=24, keep=0.875)

    eager = both(image)
    mapped = next(iter(tf.data.Dataset.from_tensors(image).map(both)))
    traced = tf.function(both, input_signature=[flexible])(image)
    for one, two, three in zip(eager, mapped, traced):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"size": 0}, "pixel"),
        ({"min_area": 0.0}, "min_area"),
        ({"min_area": 0.5, "max_area": 0.4}, "min_area"),
        ({"max_area": 1.1}, "min_area"),
        ({"strong_ops": -1}, "strong_ops"),
        ({"blur": 1.5}, "blur"),
    ],
)
def test_impossible_views_are_refused(change, word):
    settings = dict(name="query", size=8, min_area=0.2, max_area=1.0)
    views.View(**settings)
    with pytest.raises(UserError, match=f"^Expected .*{word}.*received .*; "):
        views.View(**{**settings, **change})
