"""Sizes without decoding, and partial decoding for a set of boxes."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from clsa_tf.augment import crop
from clsa_tf.data import decode, headers
from tests.marks import slow_but

# The guard of damaged files depends on how functions are inlined.
pytestmark = pytest.mark.usefixtures("rewritten_graphs")


def picture(size=(31, 23), *, seed=0, coarse=1):
    """Noise: neighbouring pixels are independent, which reveals errors."""
    width, height = size
    shape = (-(-height // coarse), -(-width // coarse), 3)
    values = np.random.RandomState(seed).randint(0, 256, shape)
    return Image.fromarray(values.astype(np.uint8)).resize(size, Image.BICUBIC)


def transparent(image):
    image = image.quantize(16)
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


def sideways():
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees
    return exif


def deep():
    values = np.random.RandomState(0).randint(0, 1 << 16, (23, 31))
    return Image.fromarray(values.astype(np.uint16))


# name -> (image to save, options)
FILES = {
    "plain.jpg": (picture(), {}),
    "one-pixel.jpg": (picture((1, 1)), {}),
    "wide.jpg": (picture((3000, 1)), {}),
    "tall.jpg": (picture((1, 3000)), {"progressive": True}),
    "progressive.jpg": (picture(), {"progressive": True}),
    "grey.jpg": (picture().convert("L"), {}),
    "cmyk.jpg": (picture().convert("CMYK"), {}),
    "sideways.jpg": (picture(), {"exif": sideways()}),
    "one-pixel.png": (picture((1, 1)), {}),
    "wide.png": (picture((3000, 1)), {}),
    "palette.png": (picture().quantize(16), {}),
    "see-through.png": (transparent(picture()), {}),
    "deep.png": (deep(), {}),
    "tall.gif": (picture((1, 3000)), {}),
    "animated.gif": (
        picture(),
        {"save_all": True, "append_images": [picture(seed=1)]},
    ),
    "palette.bmp": (picture((1, 7)).quantize(16), {}),
}


def save(path, image, **options):
    image.save(path, **options)
    return path.read_bytes()


def pillow(path, *, reduction=1):
    """The pixels according to Pillow, reduced by its draft mode."""
    with Image.open(path) as image:
        if image.mode.startswith("I;16"):
            return np.repeat(np.asarray(image)[..., None] // 256, 3, axis=2)
        width, height = image.size
        if reduction > 1:
            image.draft("RGB", (width // reduction, height // reduction))
        pixels = np.asarray(image.convert("RGB"))
    shape = (-(-height // reduction), -(-width // reduction), 3)
    assert pixels.shape == shape
    return pixels


def whole(size):
    return tf.concat([[0, 0], size], axis=0)


def in_graph(function, *arguments):
    data = tf.data.Dataset.from_tensors(arguments).map(function)
    return next(data.as_numpy_iterator())


def decode_each(encoded, trials, sizes):
    """Returns the results of `decode_boxes` for each trial of V boxes."""

    def both(boxes):
        opened = decode.open_image(encoded)
        return decode.decode_boxes(opened, boxes, sizes=sizes)

    trials = np.asarray(trials, np.int32)  # [T, V, 4]
    data = tf.data.Dataset.from_tensor_slices(trials).map(both)
    return list(data.as_numpy_iterator())


def decode_boxes(encoded, boxes, sizes):
    return decode_each(encoded, [boxes], sizes)[0]


def cut(image, box):
    top, left, height, width = (int(x) for x in box)
    np.testing.assert_array_equal([top, left, height, width], box)
    assert min(top, left) >= 0
    assert top + height <= image.shape[0] and left + width <= image.shape[1]
    return image[top : top + height, left : left + width]


def random_boxes(random, size, count, *, least=1):
    """Boxes with sides of at least `least` pixels in an image of a size."""
    rows = []
    for _ in range(count):
        width, height = (random.randint(least, n + 1) for n in size)
        left = random.randint(size[0] - width + 1)
        top = random.randint(size[1] - height + 1)
        rows.append((top, left, height, width))
    return rows


# All kinds of files


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", slow_but(6, FILES))
def test_every_kind_of_file_equals_pillow(tmp_path, name):
    image, options = FILES[name]
    encoded = save(tmp_path / name, image, **options)
    expected = pillow(tmp_path / name)

    opened = in_graph(decode.open_image, encoded)
    assert opened.size.tolist() == [image.height, image.width]
    if name.endswith(".jpg"):
        assert opened.pixels.shape == (0, 0, 3)
    else:
        np.testing.assert_array_equal(opened.pixels, expected)

    box = whole(opened.size)[None]
    pixels, boxes = decode_boxes(encoded, box, [3000])
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(boxes, box)
    np.testing.assert_array_equal(in_graph(decode.decode, encoded), expected)


def test_exif_rotation_is_not_applied(tmp_path):
    encoded = save(tmp_path / "a.jpg", picture(), exif=sideways())
    with Image.open(tmp_path / "a.jpg") as image:
        assert ImageOps.exif_transpose(image).size == (23, 31)
    assert in_graph(decode.decode, encoded).shape == (23, 31, 3)
    assert in_graph(decode.open_image, encoded).size.tolist() == [23, 31]


def test_other_formats_are_decoded_whole(tmp_path):
    encoded = save(tmp_path / "a.png", picture((90, 70)))
    boxes = [(3, 5, 60, 70), (0, 1, 64, 8)]
    pixels, kept = decode_boxes(encoded, boxes, [2, 1])
    np.testing.assert_array_equal(pixels, pillow(tmp_path / "a.png"))
    np.testing.assert_array_equal(kept, boxes)


def test_sizes_and_boxes_have_static_shapes():
    def both(encoded):
        opened = decode.open_image(encoded)
        boxes = tf.stack([whole(opened.size)] * 2)
        return opened, decode.decode_boxes(opened, boxes, sizes=[4, 2])

    data = tf.data.Dataset.from_tensors(b"").map(both)
    opened, (pixels, boxes) = data.element_spec
    assert opened.size.shape == [2] and boxes.shape == [2, 4]
    for image in (opened.pixels, pixels):
        assert image.shape.as_list() == [None, None, 3]
        assert image.dtype == tf.uint8


# Windows


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_pixels_in_boxes_equal_the_whole_image(tmp_path, subsampling, options):
    size = (70, 61)
    encoded = save(
        tmp_path / "a.jpg",
        picture(size, coarse=2),
        subsampling=subsampling,
        **options,
    )
    expected = pillow(tmp_path / "a.jpg")
    random = np.random.RandomState(0)
    trials = [random_boxes(random, size, 2) for _ in range(60)]
    # Single boxes lie more often away from the borders of the image.
    trials += [[box, box] for boxes in trials for box in boxes]
    results = decode_each(encoded, trials, [40, 40])
    for boxes, (pixels, moved) in zip(trials, results):
        for box, new in zip(boxes, moved):
            np.testing.assert_array_equal(cut(pixels, new), cut(expected, box))
        tops, lefts, heights, widths = np.transpose(boxes)
        # At most one more pixel on each side, which interpolation needs.
        assert pixels.shape[0] <= 2 + (tops + heights).max() - tops.min()
        assert pixels.shape[1] <= 2 + (lefts + widths).max() - lefts.min()


def test_bytes_after_the_end_are_ignored(tmp_path):
    encoded = save(tmp_path / "a.jpg", picture((40, 30))) + b"\0\0\0"
    box = (12, 9, 10, 20)
    pixels, moved = decode_boxes(encoded, [box], [10])
    expected = cut(pillow(tmp_path / "a.jpg"), box)
    np.testing.assert_array_equal(cut(pixels, moved[0]), expected)


# Reductions


@pytest.mark.slow
@pytest.mark.parametrize(
    "box, size, reduction",
    [
        ((0, 0, 180, 263), 90, 1),
        ((0, 0, 180, 263), 46, 1),
        ((0, 0, 180, 263), 45, 2),
        ((0, 0, 180, 263), 23, 2),
        ((0, 0, 180, 263), 22, 4),
        ((0, 0, 180, 263), 12, 4),
        ((0, 0, 180, 263), 11, 8),
        ((0, 0, 180, 263), 1, 8),
        ((0, 3, 180, 159), 20, 2),  # the width decides
        ((0, 3, 180, 160), 20, 4),
    ],
)
def test_the_largest_reduction_leaves_twice_the_needed_size(
    tmp_path, box, size, reduction
):
    encoded = save(tmp_path / "a.jpg", picture((263, 180), coarse=3))
    _, moved = decode_boxes(encoded, [box], [size])
    np.testing.assert_array_equal(moved[0, 2:], np.divide(box[2:], reduction))


def test_the_reduction_suits_every_box(tmp_path):
    encoded = save(tmp_path / "a.jpg", picture((264, 180), coarse=3))
    boxes = [(0, 0, 180, 264), (80, 100, 60, 60), (0, 0, 180, 264)]
    for sizes, reduction in (
        ((11, 3, 11), 8),
        ((11, 7, 11), 4),
        ((11, 30, 11), 1),
        ((91, 3, 11), 1),
    ):
        _, moved = decode_boxes(encoded, boxes, sizes)
        assert moved[0, 2] == moved[2, 2] == 180 / reduction


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_reduced_pixels_equal_the_reduced_image(
    tmp_path, reduction, subsampling
):
    size, side = (133, 95), 5
    encoded = save(
        tmp_path / "a.jpg", picture(size, coarse=2), subsampling=subsampling
    )
    expected = pillow(tmp_path / "a.jpg", reduction=reduction)
    random = np.random.RandomState(reduction)
    least = 2 * reduction * side
    trials = [random_boxes(random, size, 2, least=least) for _ in range(40)]
    # One more box, too small for a larger reduction.
    for boxes in trials:
        boxes.append((*boxes[0][:2], least, least))
    results = decode_each(encoded, trials, [side] * 3)
    for boxes, (pixels, moved) in zip(trials, results):
        shift = np.round(moved[0, :2] - np.divide(boxes[0][:2], reduction), 3)
        for box, new in zip(boxes, moved):
            np.testing.assert_array_equal(
                new[2:], np.divide(box[2:], reduction)
            )
            # All boxes move by the corner of the window, in whole pixels.
            np.testing.assert_allclose(
                new[:2] - np.divide(box[:2], reduction), shift, atol=1e-4
            )
            # They contain the same pixels as the whole reduced image.
            first = np.floor(new[:2]).astype(int)
            last = np.ceil(new[:2] + new[2:]).astype(int)
            inside = (*first, *(last - first))
            in_image = (*(first - shift.astype(int)), *(last - first))
            np.testing.assert_array_equal(
                cut(pixels, inside), cut(expected, in_image)
            )


def test_reduced_crops_are_close_to_those_of_the_whole_image(tmp_path):
    """Edges are accurate to fractions of a reduced pixel."""
    encoded = save(tmp_path / "a.jpg", picture((400, 300), coarse=20))
    boxes = [(13, 27, 161, 203), (101, 50, 190, 161)]
    pixels, moved = decode_boxes(encoded, boxes, [20, 20])
    assert moved[0, 2] == 161 / 4
    whole_image = pillow(tmp_path / "a.jpg")
    pairs = crop.rectangles(
        [pixels, whole_image],
        np.stack([moved, boxes]).astype(np.float32),
        sizes=[20, 20],
    )
    for reduced, exact in pairs:
        pixels = [np.int32(x.resize()) for x in (reduced, exact)]
        assert np.abs(pixels[0] - pixels[1]).mean() < 1.5  # of 255


# Damage


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 40])  # reduced by 8 and not at all
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_files_truncated_in_the_scan_are_errors(tmp_path, share, options, size):
    encoded = save(tmp_path / "a.jpg", picture((90, 80)), **options)
    encoded = encoded[: int(share * len(encoded))]
    assert in_graph(decode.open_image, encoded).size.tolist() == [80, 90]
    with pytest.raises(tf.errors.InvalidArgumentError):
        in_graph(decode.decode, encoded)
    for top in (0, 40):  # the upper rows are complete
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode_boxes(encoded, [(top, 0, 40, 40)], [size])


@pytest.mark.parametrize("name", ["plain.jpg", "deep.png", "animated.gif"])
def test_files_truncated_in_the_header_are_errors(tmp_path, name):
    image, options = FILES[name]
    encoded = save(tmp_path / name, image, **options)[:20]
    for function in (decode.decode, decode.open_image):
        with pytest.raises(tf.errors.InvalidArgumentError):
            in_graph(function, encoded)


@pytest.mark.parametrize("encoded", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"?"])
def test_files_without_an_image_are_errors(encoded):
    for function in (decode.decode, decode.open_image):
        with pytest.raises(tf.errors.InvalidArgumentError):
            in_graph(function, encoded)


@pytest.mark.slow
def test_damage_beside_good_files_never_ends_a_dataset(tmp_path):
    """The order in which parallel calls end does not matter."""
    good = save(tmp_path / "a.jpg", picture())
    damaged = good[: len(good) // 5]

    def four(number):
        contents = [
            tf.where((number + i) % 4 == 0, damaged, good) for i in range(4)
        ]
        opened = decode.try_open(contents, rules=headers.DEFAULT)
        return [one.code == headers.OK for one in opened]

    groups = tf.data.Dataset.range(2000).map(four, num_parallel_calls=8)
    for worked in groups.as_numpy_iterator():
        assert sum(worked) == 3


@pytest.mark.slow
@pytest.mark.parametrize("whole_below", [0, 1000])
def test_damage_does_not_end_a_guarded_dataset(tmp_path, whole_below):
    jpeg = save(tmp_path / "a.jpg", picture())
    png = save(tmp_path / "a.png", picture())
    contents = [jpeg, jpeg[:-30], b"", png[:-60], png]

    def guarded(encoded):
        opened = decode.try_open(
            tf.unstack(encoded),
            rules=headers.DEFAULT,
            whole_below=whole_below,
        )
        results = []
        for one in opened:
            code, image, boxes = decode.try_decode_boxes(
                one, whole(one.size)[None], sizes=[1]
            )
            results.append((code == headers.OK, image, boxes))
        return tuple(results)

    # One by one, and all at once.
    one_by_one = tf.data.Dataset.from_tensor_slices(contents).batch(
        1, drop_remainder=True
    )
    rows = [row for (row,) in one_by_one.map(guarded).as_numpy_iterator()]
    together = tf.data.Dataset.from_tensors(contents).map(guarded)
    for one, other in zip(rows, next(together.as_numpy_iterator())):
        for x, y in zip(one, other):
            np.testing.assert_array_equal(x, y)
    worked, images, boxes = zip(*rows)
    assert worked == (True, False, False, False, True)
    # Reduced by 8, unless it was small enough to be decoded whole.
    first = (23, 31) if whole_below else (3, 4)
    shapes = [image.shape[:2] for image in images]
    assert shapes == [first, (1, 1), (1, 1), (1, 1), (23, 31)]
    for image, box in zip(images, boxes):
        assert (box[:, :2] + box[:, 2:] <= image.shape[:2]).all()
