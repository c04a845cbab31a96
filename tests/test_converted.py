"""Files that only Pillow can read, and malicious files."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from clsa_tf.augment import crop
from clsa_tf.augment.views import View
from clsa_tf.data import converted, decode, headers
from clsa_tf.data.evaluation_batches import evaluation_batches
from clsa_tf.data.open import open_source
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.service_client import Services
from clsa_tf.data.source_checks import check_sizes
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.errors import UserError
from tests.marks import slow_but
from tests.test_untrusted import png_of_zeros

FORMATS = ("WEBP", "TIFF", "HEIF", "AVIF")
VIEWS = (View("query", 8, 0.2, 1.0),)
assert not converted.missing("HEIC"), "pillow-heif is part of the tests"


def photo(number=0, size=(61, 40)):
    coarse = np.random.default_rng(number).integers(0, 256, [4, 5, 3], np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC)


def contents(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    return contents(photo(), kind, exif=exif)


def opened(encoded):
    return Image.open(io.BytesIO(encoded))


def read(path, content, **rules):
    """Returns the code and the pixels of a file, as training reads it."""
    path.write_bytes(content)
    rules = headers.DEFAULT._replace(**rules)
    encoded, code = converted.read(str(path), rules)
    assert bool(encoded) == (code == headers.CHECKED)
    code, pixels = decode.try_decode(encoded, rules, code=code)
    return code, pixels.numpy()


@pytest.mark.parametrize("kind", FORMATS)
def test_pixels_equal_pillow(kind, tmp_path):
    code, pixels = read(tmp_path / "x", contents(photo(), kind))
    assert code == headers.OK
    expected = np.asarray(opened(contents(photo(), kind)).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_exif_rotation_equals_pillow(kind, tmp_path):
    code, pixels = read(tmp_path / "x", rotated(kind))
    assert code == headers.OK
    # Writers of HEIC files have already applied the rotation of the EXIF data.
    assert pixels.shape == ((40, 61, 3) if kind == "HEIF" else (61, 40, 3))
    expected = ImageOps.exif_transpose(opened(rotated(kind))).convert("RGB")
    np.testing.assert_array_equal(pixels, expected)
    _, pixels = read(tmp_path / "x", rotated(kind), exif_rotation=False)
    # To TIFF files Pillow always applies it.
    if kind == "WEBP":
        assert pixels.shape == (40, 61, 3)


@pytest.mark.slow
def test_unusual_pixels_equal_pillow(tmp_path):
    values = np.arange(0, 65536, 97, dtype=np.uint16).reshape(26, 26)
    _, deep = read(tmp_path / "x", contents(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(deep[..., 1], values // 256)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        image = photo().convert(mode)
        _, pixels = read(tmp_path / "x", contents(image, "TIFF"))
        np.testing.assert_array_equal(pixels, image.convert("RGB"))
    floats = Image.fromarray(np.float32(values))
    code, _ = read(tmp_path / "x", contents(floats, "TIFF"))
    assert code == headers.DAMAGED
    many = contents(
        photo(), "WEBP", save_all=True, append_images=[photo(1)], lossless=True
    )
    _, pixels = read(tmp_path / "x", many)
    np.testing.assert_array_equal(pixels, photo())


def test_files_for_tensorflow_are_not_converted(tmp_path):
    path = tmp_path / "x"
    for content in (contents(photo(), "PNG"), b"no image", b""):
        path.write_bytes(content)
        assert converted.read(str(path), headers.DEFAULT) == (content, 0)


@pytest.mark.parametrize("kind", slow_but(1, FORMATS))
def test_limits_and_damage_have_their_codes(kind, tmp_path):
    # (TIFF files are larger than the files that they are converted to.)
    path, whole = tmp_path / "x", contents(photo(), kind)
    size = len(whole)
    assert read(path, whole, image_bytes=size - 1)[0] == headers.BYTES
    assert read(path, whole, image_bytes=size)[0] == headers.OK
    assert read(path, whole, image_pixels=61 * 40 - 1)[0] == headers.PIXELS
    assert read(path, whole, image_pixels=61 * 40)[0] == headers.OK
    assert read(path, whole, image_bytes=0, image_pixels=0)[0] == headers.OK
    for share in (0.2, 0.6):
        code, _ = read(path, whole[: int(share * size)])
        assert code == headers.DAMAGED


def test_the_limit_of_bytes_applies_to_the_file_and_not_its_pixels(tmp_path):
    encoded = contents(photo(size=(400, 300)), "WEBP")
    limit = 2 * len(encoded)
    assert limit < 3 * 400 * 300
    code, pixels = read(tmp_path / "x", encoded, image_bytes=limit)
    assert code == headers.OK and pixels.shape == (300, 400, 3)
    # It also applies to files that are not converted.
    big = contents(photo(size=(400, 300)), "BMP")
    assert read(tmp_path / "x", big, image_bytes=limit)[0] == headers.BYTES


@pytest.mark.parametrize("kind", slow_but(1, FORMATS))
def test_each_format_can_be_the_first(kind, tmp_path):
    """In a process that has read no other format."""
    (tmp_path / "x").write_bytes(contents(photo(), kind))
    script = (
        "import sys\n"
        "from clsa_tf.data import converted, headers\n"
        "print(converted.read(sys.argv[1], headers.DEFAULT)[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x")],
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"{headers.CHECKED}\n", result.stderr


def test_files_that_cannot_be_opened_have_a_code(tmp_path):
    rules = headers.DEFAULT
    absent = converted.read(str(tmp_path / "absent"), rules)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    found = [
        converted.read(os.fsencode(tmp_path / name), rules)
        for name in ("pipe", "loop", "folder")
    ]
    assert {absent, *found} == {(b"", headers.CLOSED)}


def test_the_limit_of_pixels_replaces_pillow_s_own(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    encoded = contents(photo(), "WEBP")
    assert read(tmp_path / "x", encoded, image_pixels=999)[0] == headers.PIXELS
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert read(tmp_path / "x", encoded, image_pixels=10**6)[0] == headers.OK
    assert Image.MAX_IMAGE_PIXELS == 10**6
    assert read(tmp_path / "x", encoded, image_pixels=0)[0] == headers.OK
    assert Image.MAX_IMAGE_PIXELS is None


# ---- Folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One photograph in nine files, two of them rotated, and bad files."""
    root = tmp_path_factory.mktemp("photos")
    exif = Image.Exif()
    exif[0x0112] = 8
    for name, encoded in {
        "a.png": contents(photo(), "PNG"),
        "b.jpg": contents(photo(), "JPEG", quality=95, exif=exif),
        "c.webp": rotated("WEBP"),
        "d.tiff": contents(photo(), "TIFF"),
        "e.HEIC": contents(photo(), "HEIF"),
        "f.avif": contents(photo(), "AVIF"),
        "g": contents(photo(), "PNG"),
        "h": contents(photo(), "WEBP"),
        "i.jpe": contents(photo(), "JPEG"),
        "p.jpg": contents(photo(), "WEBP"),
        "q.webp": b"RIFF\x24\0\0\0WEBPVP8 ",
        "r.png": png_of_zeros(20_000, 20_000),
        "s.jpg": b"",
        "t.tif": b"no image",
        "u.png": contents(photo(), "PNG")[:-60],
        "x.txt": b"text",
    }.items():
        (root / name).write_bytes(encoded)
    (root / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(root / "pipe.jpg")
    return root


BAD = {
    "gone.jpg": "cannot be opened",
    "p.jpg": "is a WebP file, not a JPEG, PNG, BMP or GIF file",
    "q.webp": "is damaged or truncated",
    "r.png": "has more than 50000000 pixels in all or 65535 in a row or "
    "column, or far more scans than photographs have",
    "s.jpg": "is empty",
    "t.tif": "is not a JPEG, PNG, BMP or GIF file",
    "u.png": "is damaged or truncated",
}


@pytest.mark.slow
def test_training_and_evaluation_read_the_same_files(folder, tmp_path):
    source = open_source(f"folder:{folder}")
    assert source.size == 9 + len(BAD)
    left_out, recognised = source.notes
    assert f"{folder}: 2 files: 1 .txt, 1 that is not a file" in left_out
    assert f"{folder}: 3 files: 2 without extension, 1 .jpe" in recognised
    unreadable = UnreadableImages(max_bad_share=1.0)
    unreadable.record(tmp_path)
    batches = evaluation_batches(
        source,
        image_size=32,
        crop_ratio=1.0,
        batch_size=99,
        unreadable=unreadable,
    )
    ((images, _),) = batches.as_numpy_iterator()
    assert unreadable.count == len(BAD)
    upright = crop.central(np.asarray(photo()), size=32, crop_ratio=1.0)
    right, left = (
        crop.central(np.rot90(photo(), times), size=32, crop_ratio=1.0)
        for times in (-1, 1)
    )
    expected = [upright, left, right] + 6 * [upright]
    assert len(images) == 9
    for image, wanted in zip(np.int32(images), expected):
        assert np.abs(image - np.int32(wanted)).mean() < 8
    lines = (tmp_path / "unreadable.txt").read_text().splitlines()
    found = dict(line.split("\t") for line in lines)
    assert found == {str(folder / name): why for name, why in BAD.items()}

    again = UnreadableImages(max_bad_share=1.0)
    again.record(tmp_path)
    steps = training_batches(
        source, VIEWS, batch_size=8, seed=0, start_step=0, unreadable=again
    )
    list(steps.take(4))  # two epochs
    assert again.count == len(BAD)  # and of the same names
    assert (tmp_path / "unreadable.txt").read_text().splitlines() == lines


def test_errors_about_bad_files_name_the_limit(folder):
    source = open_source(f"folder:{folder}")
    unreadable = UnreadableImages(max_bad_share=0.0)
    batches = evaluation_batches(
        source,
        image_size=8,
        crop_ratio=1.0,
        batch_size=99,
        unreadable=unreadable,
    )
    with pytest.raises(tf.errors.OpError):
        list(batches)
    assert "gone.jpg, which cannot be opened" in str(unreadable.error())
    rules = headers.DEFAULT._replace(image_pixels=100)
    source = open_source(f"folder:{folder}", rules=rules)
    unreadable = UnreadableImages(max_bad_share=0.5)
    batches = evaluation_batches(
        source,
        image_size=8,
        crop_ratio=1.0,
        batch_size=99,
        unreadable=unreadable,
    )
    with pytest.raises(tf.errors.OpError):
        list(batches)
    assert "raise --max_bad_share, or --max_image_pixels" in str(
        unreadable.error()
    )
    with pytest.raises(UserError, match="more than 100 pixels"):
        check_sizes(source, VIEWS, allow_upscaling=True)


def test_without_more_formats_other_files_are_left_out(folder):
    rules = headers.DEFAULT._replace(more_formats=False)
    source = open_source(f"folder:{folder}", rules=rules)
    assert source.size == 2 + 5 and not source.local  # a, b and the bad ones
    assert "2 without extension" in source.notes[0]


def test_services_cannot_convert(folder, tmp_path):
    source = open_source(f"folder:{folder}")
    options = dict(batch_size=4, seed=0, start_step=0)
    with pytest.raises(UserError, match=r"\(7\) .*--nomore_formats"):
        training_batches(
            source,
            VIEWS,
            unreadable=UnreadableImages(max_bad_share=0.0),
            services=Services(("grpc://localhost:1",)),
            **options,
        )


def test_schemes_that_tensorflow_cannot_read_are_rejected():
    with pytest.raises(UserError, match=r"file://.*received s3://bucket/x"):
        open_source("folder:s3://bucket/x")
