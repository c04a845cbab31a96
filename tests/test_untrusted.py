"""Malicious image files, which must be rejected quickly."""

import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clsa_tf.augment import crop
from clsa_tf.data import headers
from clsa_tf.data.decode import decode
from export.model import untrusted
from tests import exports

SIZE = 16
LIMITS = untrusted.Limits(image_bytes=100_000, image_pixels=250_000)


@tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
def prepare(image_bytes):
    return untrusted.prepare(
        image_bytes, size=SIZE, crop_ratio=0.9, limits=LIMITS
    )


def code(encoded):
    """Returns the code of `headers` for a file; checks that it has a reason."""
    images, codes = prepare(tf.constant([encoded]))
    number = int(codes[0])
    if number:
        assert not images.numpy().any()
    assert untrusted.reasons(LIMITS)[number]
    return number


def photo(width=60, height=40, seed=0):
    coarse = np.random.default_rng(seed).uniform(0, 255, [4, 5, 3])
    return Image.fromarray(np.uint8(coarse)).resize([width, height])


KINDS = ["JPEG", "PNG", "BMP", "GIF"]
FILES = {kind: exports.encode(photo(), kind) for kind in KINDS}
FILES["progressive"] = exports.encode(photo(), "JPEG", progressive=True)


def chunk(kind, data):
    body = kind + data
    return (
        struct.pack(">I", len(data))
        + body
        + struct.pack(">I", zlib.crc32(body))
    )


def png_of_zeros(width, height):
    """A valid file, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    row = bytes(1 + width)
    data = b"".join(packer.compress(row) for _ in range(height))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", data + packer.flush())
        + chunk(b"IEND", b"")
    )


def gif(*frames):
    """A GIF of pairs of claimed size and Pillow image."""
    whole = exports.encode(frames[0][1], "GIF")
    table = 3 * 2 ** ((whole[10] & 7) + 1) if whole[10] & 128 else 0
    result = whole[: 13 + table]
    for (width, height), image in frames:
        encoded = exports.encode(image, "GIF")
        begin = 13 + (3 * 2 ** ((encoded[10] & 7) + 1))
        body = encoded[encoded.index(b"\x2c", begin) : -1]
        result += body[:5] + struct.pack("<HH", width, height) + body[9:]
    return result + b";"


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_have_the_pixels_of_the_evaluation(kind):
    files = [exports.encode(photo(seed=i), kind) for i in range(3)]
    images, reasons = prepare(tf.constant(files))
    assert not reasons.numpy().any()
    for image, encoded in zip(images, files):
        expected = crop.central(decode(encoded), size=SIZE, crop_ratio=0.9)
        np.testing.assert_array_equal(image, expected)


def test_progressive_and_16_bit_and_top_down_files_are_good():
    deep = Image.fromarray(np.uint16(np.asarray(photo().convert("L"))) * 256)
    assert code(exports.encode(deep)) == headers.OK
    assert code(FILES["progressive"]) == headers.OK
    bmp = bytearray(exports.encode(photo(), "BMP"))
    bmp[22:26] = struct.pack("<i", -40)
    assert code(bytes(bmp)) == headers.OK


@pytest.mark.parametrize(
    "encoded",
    [
        b"\0" * 90_000,
        b"GIF",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"RIFF\x24\0\0\0WAVEfmt ",
    ],
    ids=["zeros", "short", "svg", "wav"],
)
def test_files_that_are_not_images_are_rejected(encoded):
    assert code(encoded) == headers.UNKNOWN


def test_an_empty_file_is_rejected():
    assert code(b"") == headers.EMPTY


@pytest.mark.parametrize(
    "kind, suffix", [("WebP", "WEBP"), ("TIFF", "TIFF"), ("AVIF", "AVIF")]
)
def test_formats_that_only_pillow_reads_are_rejected_by_name(kind, suffix):
    number = code(exports.encode(photo(), suffix))
    assert number == headers.CODES[kind]
    assert f" {kind} " in untrusted.reasons(LIMITS)[number]


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevx"])
def test_heic_is_rejected_by_name(brand):
    encoded = b"\0\0\0\x18ftyp" + brand + b"\0" * 12
    assert code(encoded) == headers.HEIC


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_truncated_files_are_rejected(kind, share):
    encoded = exports.encode(photo(), kind)
    cut = encoded[: max(8, int(share * len(encoded)))]
    assert code(cut) == headers.DAMAGED


def test_files_of_too_many_bytes_are_rejected():
    assert code(b"\xff\xd8\xff" + bytes(100_000)) == headers.BYTES
    assert " 100000 bytes" in untrusted.reasons(LIMITS)[headers.BYTES]


@pytest.mark.parametrize(
    "encoded",
    [
        png_of_zeros(600, 600),
        exports.encode(photo(600, 600), "JPEG"),
        gif(((65_000, 65_000), photo())),
        b"BM" + bytes(16) + struct.pack("<ii", 30_000, 30_000) + bytes(60),
    ],
    ids=["png", "jpeg", "gif", "bmp"],
)
def test_too_many_pixels_are_not_decoded(encoded):
    assert code(encoded) == headers.PIXELS
    assert " 250000 pixels" in untrusted.reasons(LIMITS)[headers.PIXELS]


def test_a_bomb_of_900_million_pixels_is_rejected():
    bomb = png_of_zeros(30_000, 30_000)
    assert len(bomb) < 1_000_000
    limits = untrusted.DEFAULT
    _, codes = untrusted.prepare(
        tf.constant([bomb]), size=SIZE, crop_ratio=1.0, limits=limits
    )
    assert int(codes[0]) == headers.PIXELS
    assert " 50000000 pixels" in untrusted.reasons(limits)[headers.PIXELS]


def test_a_side_of_more_than_65535_pixels_is_rejected():
    assert code(png_of_zeros(65_536, 1)) == headers.PIXELS
    assert " 65535 " in untrusted.reasons(LIMITS)[headers.PIXELS]
    assert code(png_of_zeros(65_535, 1)) == headers.OK


def test_a_jpeg_with_many_scans_is_rejected():
    encoded = exports.encode(photo(400, 500), "JPEG", progressive=True)
    assert code(encoded) == headers.OK
    # The last scan is repeated; a decoder would process all of them.
    begin = encoded.rindex(b"\xff\xda")
    many = encoded[:-2] + encoded[begin:-2] * 20 + b"\xff\xd9"
    assert code(many) == headers.PIXELS


def test_only_the_first_frame_of_an_animation_is_read():
    first, second = photo(), photo(seed=1)
    still = gif(((60, 40), first))
    bomb = gif(((60, 40), first), *[((65_000, 65_000), second)] * 50)
    images, reasons = prepare(tf.constant([still, bomb]))
    assert not reasons.numpy().any()
    np.testing.assert_array_equal(images[0], images[1])
    assert images.numpy().any()
    # The decoder never gets the others, and needs no memory for them.
    number = headers._NUMBERS["GIF"]
    assert headers._first_frame(bomb, number)[0].numpy() == still


def test_a_gif_with_endless_blocks_is_rejected():
    head = exports.encode(photo(), "GIF")[:13]
    for body in (b"\x21\xfe\x00" * 1000, b"\x21\xfe" + b"\xff" * 3000, b""):
        assert code(head + body) == headers.DAMAGED


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_mutated_files_are_decoded_or_rejected(data):
    fuzz(data)


@pytest.mark.slow
@settings(
    max_examples=4_000,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_thousands_of_mutated_files_are_decoded_or_rejected(data):
    fuzz(data)


def fuzz(data):
    """Changes, removes and repeats parts of a good file."""
    encoded = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(encoded)))
        new = data.draw(st.binary(max_size=4))
        what = data.draw(st.sampled_from(["set", "insert", "cut", "double"]))
        if what == "set":
            encoded[at : at + len(new)] = new
        elif what == "insert":
            encoded[at:at] = new
        elif what == "cut":
            del encoded[at : at + data.draw(st.integers(0, 50))]
        else:
            encoded[at:at] = encoded[at : at + 300]
    good = FILES["PNG"]
    images, reasons = prepare(tf.constant([good, bytes(encoded), good]))
    assert reasons.numpy()[[0, 2]].tolist() == [0, 0]
    allowed = set(range(headers.OK, headers.AVIF + 1)) - {headers.CLOSED}
    assert reasons.numpy()[1] in allowed
    np.testing.assert_array_equal(images[0], images[2])
