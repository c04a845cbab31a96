"""The embedded dataset: its pictures, labels and storage."""

import io
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from clsa_tf.data.shapes import dataset
from clsa_tf.data.shapes import render as draw
from clsa_tf.errors import UserError

SIZES = {
    "shape": len(draw.SHAPES),
    "color": len(draw.COLORS),
    "orientation": len(draw.ORIENTATIONS),
    "texture": len(draw.TEXTURES),
}


class FewShapes(dataset.Shapes, skip_registration=True):
    """The same dataset with few images."""

    EXAMPLES = {"train": 30, "test": 20}


def centred_mask(shape, angle):
    return draw.shape_mask(shape, center=(0.5, 0.5), size=0.7, angle=angle)


def overlap(first, second):
    """Intersection over union of two masks."""
    return np.minimum(first, second).sum() / np.maximum(first, second).sum()


def test_same_arguments_give_the_same_bytes():
    for split in ("train", "test"):
        for index in range(20):
            first = dataset.encoded_example(split, index)
            second = dataset.encoded_example(split, index)
            assert first.pop("image").read() == second.pop("image").read()
            assert first == second


def test_nuisances_differ_between_indices_and_splits():
    factors = draw.Factors(0, 0, 0, 0)
    images = {
        draw.render(split, index, factors).tobytes()
        for split in ("train", "test")
        for index in range(20)
    }
    assert len(images) == 40


def test_stored_labels_are_the_drawn_factors():
    names = ("label", "color", "orientation", "texture")
    for index in range(20):
        example = dataset.encoded_example("test", index)
        stored = tuple(example[name] for name in names)
        assert stored == tuple(draw.draw_factors("test", index))


def test_images_are_rgb_jpegs_of_quality_95():
    encoded = dataset.encoded_example("train", 3)["image"]
    with Image.open(encoded) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert image.size == (64, 64)
        tables = image.quantization
    reference = io.BytesIO()
    Image.new("RGB", (64, 64)).save(reference, "JPEG", quality=95)
    assert tables == Image.open(reference).quantization


def test_jpeg_is_close_to_the_rendering():
    factors = draw.draw_factors("train", 5)
    drawn = draw.render("train", 5, factors).astype(float)
    encoded = dataset.encoded_example("train", 5)["image"]
    stored = np.asarray(Image.open(encoded), float)
    assert drawn.shape == (64, 64, 3)
    assert np.abs(drawn - stored).mean() < 6


def test_labels_are_in_range_and_balanced():
    labels = np.array([draw.draw_factors("train", i) for i in range(10_000)])
    for column, (name, size) in enumerate(SIZES.items()):
        counts = np.bincount(labels[:, column], minlength=size)
        assert len(counts) == size, name
        np.testing.assert_allclose(counts, 10_000 / size, rtol=0.1)
    np.testing.assert_array_equal(np.bincount(labels[:, 0]), 1000)


def test_factors_are_independent():
    labels = np.array([draw.draw_factors("train", i) for i in range(10_000)])
    correlation = np.corrcoef(labels.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.05


@pytest.mark.parametrize("factor", SIZES)
def test_every_factor_changes_the_picture(factor):
    for index in range(10):
        base = draw.Factors(0, 0, 0, 0)
        images = [
            draw.render("train", index, base._replace(**{factor: value}))
            for value in range(SIZES[factor])
        ]
        for i in range(len(images)):
            for j in range(i):
                gap = images[i].astype(float) - images[j]
                assert np.abs(gap).max() > 10, (index, i, j)


@pytest.mark.parametrize("index", range(8))
def test_luma_of_fill_is_the_same_for_every_color(index):
    gray = []
    for color in range(SIZES["color"]):
        image = draw.render("test", index, draw.Factors(5, color, 0, 0))
        gray.append(np.asarray(Image.fromarray(image).convert("L"), int))
    assert np.ptp(np.stack(gray), axis=0).max() <= 4


@pytest.mark.parametrize("shape", range(10))
def test_mask_turns_clockwise(shape):
    upright = centred_mask(shape, 0)
    for quarter in (1, 2, 3):
        turned = centred_mask(shape, 90 * quarter)
        expected = np.rot90(upright, -quarter)
        assert overlap(turned, expected) > 0.85  # strokes of 3 px


@pytest.mark.parametrize("shape", range(10))
def test_no_shape_is_symmetric_under_rotation(shape):
    upright = centred_mask(shape, 0)
    for quarter in (1, 2, 3):
        assert overlap(upright, centred_mask(shape, 90 * quarter)) < 0.85


def test_no_two_shapes_coincide_in_any_orientation_or_mirrored():
    masks = [centred_mask(shape, 0) for shape in range(10)]
    for i in range(10):
        for j in range(i):
            for view in (masks[j], masks[j][:, ::-1]):
                for quarter in range(4):
                    alike = overlap(masks[i], np.rot90(view, quarter))
                    assert alike < 0.85, (draw.SHAPES[i], draw.SHAPES[j])


def test_orientation_label_turns_the_shape_in_the_image():
    # The bar of the T is heavier than its foot. The shape is where the picture
    # differs from the same picture in another colour.
    tee = draw.SHAPES.index("tee")
    checked = 0
    for index in range(12):
        for orientation in range(4):
            factors = draw.Factors(tee, 0, orientation, 0)
            one = draw.render("train", index, factors)
            other = draw.render("train", index, factors._replace(color=2))
            ink = np.abs(one.astype(float) - other).sum(-1) > 12
            y, x = np.nonzero(ink)
            if min(x.min(), y.min()) == 0 or max(x.max(), y.max()) == 63:
                continue  # cut by the frame
            offset = (
                x.mean() - (x.min() + x.max()) / 2,
                y.mean() - (y.min() + y.max()) / 2,
            )
            pointing = ((0, -1), (1, 0), (0, 1), (-1, 0))[orientation]
            assert np.dot(offset, pointing) > 1, (index, orientation)
            checked += 1
    assert checked > 10


def test_pixel_statistics_are_in_their_ranges():
    images = [
        draw.render("train", i, draw.draw_factors("train", i))
        for i in range(300)
    ]
    images = np.stack(images).astype(float)
    assert 110 < images.mean() < 145
    assert 30 < images.std() < 75
    assert (images.std(axis=(1, 2, 3)) > 8).all()  # no picture is empty


def test_prepare_generates_what_encoded_example_returns(tmp_path):
    builder = dataset.prepare(tmp_path, builder_class=FewShapes)
    assert builder.info.file_format.value == "tfrecord"
    for split, count in FewShapes.EXAMPLES.items():
        assert builder.info.splits[split].num_examples == count
        decoders = {"image": tfds.decode.SkipDecoding()}
        stored = builder.as_dataset(split=split, decoders=decoders)
        expected = {
            example.pop("image").read(): example
            for example in (
                dataset.encoded_example(split, i) for i in range(count)
            )
        }
        seen = {
            example.pop("image"): {k: int(v) for k, v in example.items()}
            for example in tfds.as_numpy(stored)
        }
        assert seen == expected


def test_features_name_the_factors(tmp_path):
    features = FewShapes(data_dir=str(tmp_path)).info.features
    assert features["image"].shape == (64, 64, 3)
    assert features["label"].names == list(draw.SHAPES)
    assert features["color"].names == list(draw.COLORS)
    assert features["orientation"].names == ["up", "right", "down", "left"]
    assert features["texture"].names == list(draw.TEXTURES)


def test_shapes_is_registered_with_its_full_sizes(tmp_path):
    builder = tfds.builder("shapes", data_dir=str(tmp_path))
    assert isinstance(builder, dataset.Shapes)
    assert str(builder.version) == "1.0.0"
    assert builder.EXAMPLES == {"train": 10_000, "test": 2_000}


def test_second_prepare_changes_nothing(tmp_path):
    def state():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_ino)
            for path in pathlib.Path(builder.data_dir).iterdir()
        }

    builder = dataset.prepare(tmp_path, builder_class=FewShapes)
    before = state()
    again = dataset.prepare(tmp_path, builder_class=FewShapes)
    assert state() == before
    assert again.info.splits["train"].num_examples == 30


def test_interrupted_prepare_starts_over(tmp_path):
    class Interrupted(FewShapes, skip_registration=True):
        name = FewShapes.name

        def _generate_examples(self, split, count):
            yield from super()._generate_examples(split, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.prepare(tmp_path, builder_class=Interrupted)
    version = tmp_path / "few_shapes" / "1.0.0"
    assert not version.exists()
    # A killed process leaves this directory.
    leftover = version.with_name("incomplete.ABCDEF_1.0.0")
    leftover.mkdir()
    (leftover / "few_shapes-train.tfrecord-00000-of-00001").write_bytes(b"x")
    dataset.prepare(tmp_path, builder_class=FewShapes)
    assert version.exists() and not leftover.exists()


def test_unusable_directory_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match="Expected a writable local directory"):
        dataset.prepare(tmp_path / "file", builder_class=FewShapes)
