import json
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from clsa_tf.errors import UserError
from export import savedmodel
from export.model import card, served
from tests import exports, runs
from tests.marks import slow_but


@pytest.fixture(scope="module")
def signatures(exported):
    return tf.saved_model.load(exported.path).signatures


@pytest.fixture(scope="module")
def lenient(exported):
    """The encoder as served with `--bad_images=nan`."""
    return served.ServedEncoder(
        exported.encoder,
        image_size=exports.SIZE,
        crop_ratio=1.0,
        outputs=["embedding"],
        bad_images="nan",
    )


def assert_equal_rows(outputs, encoder, pixels):
    expected = {
        "embedding": encoder(pixels),
        "projection": encoder.project(pixels),
    }
    assert set(outputs) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-3, atol=1e-5)


def test_version_directory_is_complete_and_nothing_else_is_left(exported):
    assert exported.path == f"{exported.base}/1"
    assert os.listdir(exported.base) == ["1"]
    assert {
        "saved_model.pb",
        "variables",
        "assets.extra",
        "model_card.json",
        "README.md",
    } <= set(os.listdir(exported.path))


def test_signatures_equal_the_encoder(exported, signatures):
    pixels = exports.noise(3)
    encoded = [exports.encode(p) for p in pixels]
    for outputs in (
        signatures["serving_default"](tf.constant(encoded)),
        signatures["images"](tf.constant(np.float32(pixels / 255))),
        signatures["images_uint8"](tf.constant(pixels)),
    ):
        assert_equal_rows(outputs, exported.encoder, pixels)
        lengths = tf.norm(outputs["projection"], axis=1)
        np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)


def test_images_may_have_any_size(exported, signatures):
    pixels = exports.noise(2, 48)[:, :40]
    outputs = signatures["images_uint8"](tf.constant(pixels))
    assert_equal_rows(outputs, exported.encoder, pixels)


@pytest.mark.parametrize(
    "kind, mode",
    [
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("BMP", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("GIF", "P"),
    ],
)
def test_formats_are_decoded_as_by_pillow(exported, signatures, kind, mode):
    image = Image.fromarray(exports.noise(1)[0]).convert(mode)
    encoded = exports.encode(image, kind)
    path = exported.workdir / f"image.{kind}"
    path.write_bytes(encoded)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    outputs = signatures["serving_default"](tf.constant([encoded]))
    assert_equal_rows(outputs, exported.encoder, pixels[np.newaxis])


def test_photographs_are_resized_and_cropped(exported, signatures):
    # Noise on one side only, outside the central crop.
    image = np.full([40, 90, 3], 99, np.uint8)
    image[:, :20] = exports.noise(1, 40)[0, :, :20]
    plain = np.full([1, 32, 32, 3], 99, np.uint8)
    encoded = exports.encode(image)
    outputs = signatures["serving_default"](tf.constant([encoded]))
    assert_equal_rows(outputs, exported.encoder, plain)


def test_bad_images_give_nan_with_bad_images_nan(exported, lenient):
    pixels = exports.noise(2)
    good = [exports.encode(p) for p in pixels]
    outputs = lenient.image_bytes(tf.constant([good[0], b"no", good[1]]))
    assert set(outputs) == {"embedding", "valid"}
    assert outputs["valid"].numpy().tolist() == [True, False, True]
    expected = exported.encoder(pixels)
    rows = outputs["embedding"].numpy()
    np.testing.assert_allclose(rows[[0, 2]], expected, rtol=1e-3, atol=1e-5)
    assert np.isnan(rows[1]).all()
    images = np.float32(pixels / 255)
    images[0, 0, 0, 0] = np.nan
    outputs = lenient.images(tf.constant(images))
    assert outputs["valid"].numpy().tolist() == [False, True]
    np.testing.assert_allclose(
        outputs["embedding"][1], expected[1], rtol=1e-3, atol=1e-5
    )
    assert np.isnan(outputs["embedding"][0]).all()


@pytest.mark.parametrize(
    "value, words",
    [
        (np.nan, "finite"),
        (np.inf, "finite"),
        (255.0, "255"),
        (-0.5, "0 to 1"),
    ],
)
def test_invalid_values_are_rejected_with_the_image(signatures, value, words):
    images = np.full([3, 32, 32, 3], 0.5, np.float32)
    images[2, 5, 6, 1] = value
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        signatures["images"](tf.constant(images))
    assert words in str(error.value) and "image 2 " in str(error.value)


@pytest.mark.parametrize(
    "shape, words",
    [
        ([0, 32, 32, 3], "1 to 262144 pixels"),
        ([2, 0, 32, 3], "[2, 0, 32, 3]"),
        ([1, 2000, 2000, 3], "[1, 2000, 2000, 3]"),
    ],
)
def test_requests_without_or_with_too_many_pixels_are_rejected(
    signatures, shape, words
):
    for name, dtype in (("images", np.float32), ("images_uint8", np.uint8)):
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            signatures[name](tf.zeros(shape, dtype))
        assert words in str(error.value)


@pytest.mark.parametrize("count", [0, 257])
def test_requests_without_or_with_too_many_files_are_rejected(
    signatures, count
):
    good = exports.encode(exports.noise(1)[0])
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        signatures["serving_default"](tf.constant([good] * count, tf.string))
    text = str(error.value)
    assert "1 to 256 images" in text and f"received {count};" in text


@pytest.mark.slow
def test_versions_count_up_and_are_never_overwritten(exported, tmp_path):
    (tmp_path / "4").mkdir()
    path = savedmodel.export(
        str(exported.workdir),
        str(tmp_path),
        outputs=["projection"],
        bad_images="nan",
        image_size=48,
        precision="mixed_bfloat16",
        license_="CC0",
    )
    assert path == f"{tmp_path}/5"
    described = json.loads(pathlib.Path(path, "model_card.json").read_text())
    assert described["license"] == "CC0" and described["image_size"] == 48
    outputs = described["signatures"]["images"]["outputs"]
    assert list(outputs) == ["projection", "valid"]
    encode = tf.saved_model.load(path).signatures["serving_default"]
    pixels = exports.noise(1, 48)
    outputs = encode(tf.constant([exports.encode(pixels[0])]))
    assert set(outputs) == {"projection", "valid"} and outputs["valid"][0]
    # bfloat16 has 8 bits of precision.
    expected = exported.encoder.project(pixels)
    np.testing.assert_allclose(outputs["projection"], expected, atol=0.05)
    assert np.abs(outputs["projection"] - expected).max() > 1e-6
    with pytest.raises(UserError, match=f"{tmp_path}/5.*--version"):
        savedmodel.export(str(exported.workdir), str(tmp_path), version=5)


def test_a_version_made_meanwhile_is_not_overwritten(exported, tmp_path):
    draft, target = tmp_path / ".draft-x", tmp_path / "1"
    for path in (draft, target):
        path.mkdir()
        (path / "saved_model.pb").write_text(path.name)
    with pytest.raises(UserError, match=f"{target}.*--version"):
        savedmodel._publish(str(draft), str(target))
    assert (target / "saved_model.pb").read_text() == "1"


@pytest.mark.slow
def test_a_model_with_wrong_outputs_is_not_published(
    exported, tmp_path, monkeypatch
):
    write = savedmodel.warmup_requests.write

    def damage(path, **rest):
        """Damages the variables after the model was written."""
        write(path, **rest)
        data = pathlib.Path(path, "variables/variables.data-00000-of-00001")
        values = bytearray(data.read_bytes())
        values[1000:100000] = bytes(99000)
        data.write_bytes(values)

    monkeypatch.setattr(savedmodel.warmup_requests, "write", damage)
    with pytest.raises(UserError, match=r"\(python\).* status 1: "):
        savedmodel.export(str(exported.workdir), str(tmp_path / "export"))
    assert os.listdir(tmp_path / "export") == []


def test_the_card_states_the_origin_of_the_model(exported, tmp_path):
    text = pathlib.Path(exported.path, "model_card.json").read_text()
    described = json.loads(text)
    assert described["method"] == "clsa" and described["steps"] == 2
    assert described["encoder"]["backbone"] == "resnet18"
    assert described["evaluation"] == {}  # this run had none
    assert str(exported.workdir) not in text  # private
    weights = exported.encoder.variables
    assert described["fingerprint"] == card.fingerprint(weights)
    assert described["parameters"] == sum(v.numpy().size for v in weights)
    changed = [tf.Variable(v, name=v.name.split(":")[0]) for v in weights]
    assert card.fingerprint(changed) == described["fingerprint"]
    changed[3].assign_add(changed[3] * 1e-6 + 1e-6)
    assert card.fingerprint(changed) != described["fingerprint"]


@pytest.mark.slow
def test_the_card_has_the_figures_of_the_run(finished, tmp_path):
    workdir = finished[0]
    described = card.describe(
        str(workdir),
        savedmodel.load_trained(str(workdir)),
        {
            "image_size": 32,
            "keep": 1.0,
            "precision": "float32",
            "outputs": ["embedding"],
            "bad_images": "nan",
            "limits": savedmodel.untrusted.DEFAULT._asdict(),
        },
        license_="CC0",
    )
    logged = [e["knn"] for e in runs.lines(workdir) if "knn" in e]
    assert described["evaluation"]["knn_trained"] == pytest.approx(logged[-1])
    images = json.loads((workdir / "dataset.json").read_text())["images"]
    assert described["data"]["images"] == images
    card.write(described, str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert f"| kNN accuracy, trained | {100 * logged[-1]:.1f} % |" in text
    assert f", {images} images." in text and "| licence | CC0 |" in text
    assert "| `valid` | bool [N] |" in text


def test_a_directory_without_a_run_is_rejected(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        savedmodel.export(str(tmp_path), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "flag, words",
    slow_but(
        1,
        [
            ("--outputs=logits", "embedding, projection"),
            ("--output=gs://bucket/model", "gs://bucket/model"),
            ("--precision=auto", "float32, mixed_bfloat16, mixed_float16"),
            ("--warmup_batch_sizes=1,x", "'1,x' for --warmup_batch_sizes"),
            ("--warmup_batch_sizes=1,257", "from 1 to 256"),
        ],
    ),
)
def test_wrong_flags_are_reported_without_a_traceback(
    exported, tmp_path, flag, words
):
    command = runs.command(
        "export.savedmodel",
        f"--workdir={exported.workdir}",
        f"--output={tmp_path}",
        flag,
    )
    error = runs.call(command, status=1).stderr
    assert words in error and "Traceback" not in error
