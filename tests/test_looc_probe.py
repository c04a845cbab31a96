"""LooC's heads: each one keeps a factor that the first one ignores."""

import colorsys
import math

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from clsa_tf.data.shapes import dataset
from clsa_tf.evaluation.knn import knn_accuracy
from clsa_tf.training.checkpoint import load_trained
from tests import runs

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def picture(rng, color, orientation):
    """Rings of one of four hues, lit from one of four sides.

    Light, rings and their position are random for each image, independent of
    colour and orientation. Returns uint8 `[32, 32, 3]`.
    """
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    turn = math.radians(90 * orientation + rng.uniform(-15, 15))
    ramp = x * math.cos(turn) + y * math.sin(turn)
    left, top = rng.uniform(-0.3, 0.3, 2)
    distance = np.hypot(x - left, y - top)
    rings = np.sin(2 * math.pi * distance / rng.uniform(0.3, 1.0))
    light = rng.uniform(0.35, 0.65) + 0.2 * ramp
    light += rng.uniform(0.05, 0.2) * rings
    hue = np.array(colorsys.hsv_to_rgb(color / 4 + 0.05, 1.0, 1.0))
    pixels = light[..., np.newaxis] + 0.25 * (hue - hue @ LUMA)
    return np.uint8(255 * pixels.clip(0, 1))


def pictures(count, seed):
    """Images uint8 `[count, 32, 32, 3]`, and their colours and orientations."""
    rng = np.random.default_rng(seed)
    factors = rng.integers(4, size=[count, 2])
    images = np.stack([picture(rng, *pair) for pair in factors])
    return images, {"color": factors[:, 0], "orientation": factors[:, 1]}


COMMON = (
    "--method=looc",
    "--augmentations=color,rotation",
    "--blur=0",
    "--inbatch_negatives",
    "--queue_size=1024",
    "--key_momentum=0.98",
    "--backbone=resnet18",
    "--width=0.25",
    "--batch_norm=split",
    "--batch_norm_splits=4",
    "--batch_size=128",
    "--optimizer=lamb",
    "--base_lr=0.02",
    "--knn_epochs=0",
)


def train(workdir, *arguments):
    """Trains LooC; returns a function that projects images: `[N, H, D]`.

    The function takes and returns their labels, too.
    """
    runs.leave_out_pictures(workdir)
    runs.call(
        runs.command(
            "clsa_tf.train", f"--workdir={workdir}", *COMMON, *arguments
        )
    )
    encoder = load_trained(str(workdir)).encoder
    project = tf.function(encoder.project_heads)

    def projected(images, labels):
        parts = [images[i : i + 500] for i in range(0, len(images), 500)]
        return np.concatenate([project(part) for part in parts]), labels

    return projected


def probe(bank, queries):
    """Returns (factor, head) -> kNN accuracy of the projections.

    Args:
        bank: projections, and dictionary, factor -> labels.
        queries: the same.
    """
    return {
        (name, head): knn_accuracy(
            bank[0][:, head],
            bank[1][name],
            queries[0][:, head],
            queries[1][name],
            k=20,
            temperature=0.1,
        )
        for name in ("color", "orientation")
        for head in range(3)
    }


@pytest.mark.slow
def test_each_head_keeps_a_factor_that_the_first_one_ignores(tmp_path):
    """The pictures have little more than colour and orientation."""
    bank = pictures(4096, seed=0)
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(bank[0]):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i:04}.png")
    projected = train(
        tmp_path / "run",
        f"--dataset=folder:{tmp_path}/pictures",
        "--labels=none",
        # Only the hue varies, over its whole range: it is the factor color.
        "--jitter=0,0,0,0.5",
        "--key_crop=32:0.6:1",
        "--query_crops=32:0.6:1",
        "--allow_upscaling",
        "--total_epochs=10",
        "--image_size=32",
    )
    accuracy = probe(projected(*bank), projected(*pictures(1000, seed=1)))
    assert accuracy["color", 1] > accuracy["color", 0] + 0.25
    assert accuracy["orientation", 2] > accuracy["orientation", 0] + 0.25
    # Neither head keeps the factor of the other.
    assert accuracy["color", 1] > accuracy["color", 2] + 0.25
    assert accuracy["orientation", 2] > accuracy["orientation", 1] + 0.25


def shapes_of(split, data_dir):
    """Images uint8 `[N, 64, 64, 3]` of `shapes`, and their labels."""
    examples = dataset.prepare(data_dir).as_dataset(split=split)
    found = list(tfds.as_numpy(examples))
    labels = {
        name: np.array([x[name] for x in found])
        for name in ("label", "color", "orientation")
    }
    return np.stack([x["image"] for x in found]), labels


def of_shape(shape, projections, labels):
    """Returns the rows, of a bank or of queries, that show one shape."""
    rows = labels["label"] == shape
    return projections[rows], {name: x[rows] for name, x in labels.items()}


@pytest.mark.slow
def test_each_head_keeps_its_factor_of_shapes(tmp_path):
    """Orientation is relative to the shape: an arrow's is unlike a tee's.

    Therefore it is also probed among images of the same shape. Among all
    images the difference is smaller: the heads know the shape in three of five
    images. Measured after 16 epochs: 50 against 24 % for the colour; for the
    orientation 47 against 33 % among images of the same shape, 36 against 28 %
    among all. Ten epochs suffice for the differences expected here.
    """
    data_dir = tmp_path / "data"
    projected = train(
        tmp_path / "run",
        "--dataset=shapes",
        f"--data_dir={data_dir}",
        # Strong, because the colours are dull; always, and without greyscale.
        "--jitter=0.4,0.4,3,0.5",
        "--jitter_probability=1",
        "--gray=0",
        "--key_crop=48:0.75:1",
        "--query_crops=48:0.75:1",
        "--total_epochs=10",
        "--image_size=64",
    )
    bank = projected(*shapes_of("train", data_dir))
    queries = projected(*shapes_of("test", data_dir))
    accuracy = probe(bank, queries)
    assert accuracy["color", 1] > accuracy["color", 0] + 0.1
    assert accuracy["orientation", 2] > accuracy["orientation", 0] + 0.05

    per_shape = [
        probe(of_shape(shape, *bank), of_shape(shape, *queries))
        for shape in range(10)
    ]
    counts = np.bincount(queries[1]["label"], minlength=10)
    first, third = (
        np.average(
            [found["orientation", head] for found in per_shape], weights=counts
        )
        for head in (0, 2)
    )
    assert third > first + 0.1
