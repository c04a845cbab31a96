"""EXIF rotation of JPEGs within a graph, compared with Pillow."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from clsa_tf.data import decode, headers, orientation

SIZES = (20, 10)


def photo(width=610, height=400):
    coarse = np.random.default_rng(0).integers(0, 256, [5, 7, 3], np.uint8)
    return Image.fromarray(coarse).resize([width, height], Image.BICUBIC)


def jpeg(number=None, *, endian="<", image=None, **options):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F] = "a maker whose name does not fit into the entry"
    if number is not None:
        exif[0x0112] = number
    file = io.BytesIO()
    (image or photo()).save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


def upright(encoded):
    """Returns the pixels, rotated by Pillow."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))


def in_graph(function, *specs):
    return tf.function(function, input_signature=specs)


STRING = tf.TensorSpec([], tf.string)
read = in_graph(lambda x: decode.try_decode(x, headers.DEFAULT), STRING)
number_of = in_graph(lambda x: orientation.of_files([x])[0], STRING)


@pytest.fixture(scope="module")
def windows():
    """Decodes only the window that boxes need."""

    def windows(encoded, boxes):
        (opened,) = decode.try_open([encoded], rules=headers.DEFAULT)
        found = decode.try_decode_boxes(opened, boxes, sizes=SIZES)
        return (opened.size, *found)

    return in_graph(windows, STRING, tf.TensorSpec([2, 4], tf.int32))


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("endian", "<>")
def test_rotation_equals_pillow(number, endian, windows):
    encoded = jpeg(number, endian=endian)
    assert number_of(encoded) == number
    expected = upright(encoded)
    code, image = read(encoded)
    assert code == headers.OK
    np.testing.assert_array_equal(image, expected)
    # Windows at full resolution and at half of it.
    for scale in (1, 2):
        boxes = np.int32([[10, 20, 44, 44], [12, 100, 46, 58]]) * scale
        size, code, image, inside = windows(encoded, boxes)
        assert code == headers.OK
        assert size.numpy().tolist() == [*expected.shape[:2]]
        for (top, left, height, width), box in zip(boxes, inside.numpy()):
            window = np.int32(box)
            assert (window[2:] == (height // scale, width // scale)).all()
            y, x = window[:2]
            got = image[y : y + window[2], x : x + window[3]].numpy()
            want = expected[top : top + height, left : left + width]
            # Pixels of half the resolution are means.
            want = want.reshape(window[2], scale, window[3], scale, 3)
            np.testing.assert_allclose(
                np.float32(got), want.mean((1, 3)), atol=0 if scale == 1 else 6
            )


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(content)) + content


def test_other_segments_may_precede_exif_data():
    encoded = jpeg(6)
    before = (
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")
        + segment(0xFE, b"a comment with Exif\0\0 in it")
        + segment(0xE2, bytes(60_000))
    )
    encoded = encoded[:2] + before + encoded[2:]
    assert number_of(encoded) == 6
    np.testing.assert_array_equal(read(encoded)[1], upright(encoded))


def test_missing_or_unknown_orientations_are_upright():
    plain = io.BytesIO()
    photo().save(plain, "JPEG")
    for encoded in (plain.getvalue(), jpeg(), jpeg(0), jpeg(9), jpeg(60_000)):
        assert number_of(encoded) == 1
        np.testing.assert_array_equal(read(encoded)[1], upright(encoded))


def test_rotation_can_be_turned_off():
    rules = headers.DEFAULT._replace(exif_rotation=False)
    encoded = jpeg(6)
    code, image = decode.try_decode(encoded, rules)
    assert code == headers.OK
    np.testing.assert_array_equal(image, Image.open(io.BytesIO(encoded)))
    # PNGs are not rotated: programs disagree about their EXIF data.
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(30, 20).save(file, "PNG", exif=exif)
    assert read(file.getvalue())[1].shape == (20, 30, 3)


def test_damaged_exif_data_give_a_valid_orientation():
    """Bytes of the EXIF segment are changed or cut off, one after another."""
    encoded = jpeg(6, image=photo(16, 16))
    end = encoded.index(b"a maker")
    rng = np.random.default_rng(0)
    for place in range(2, end):
        changed = bytearray(encoded)
        changed[place] = rng.integers(256)
        assert 1 <= number_of(bytes(changed)) <= 8
        assert 1 <= number_of(encoded[:place]) <= 8
