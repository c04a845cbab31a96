"""The sheet of views: its captions describe the pictures."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from clsa_tf import gallery, methods
from clsa_tf.augment import strong
from clsa_tf.augment.strong_ops import STRONG_OPS
from clsa_tf.augment.views import View, unpack
from clsa_tf.data.open import open_train_source
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.errors import UserError
from clsa_tf.plots import sheet
from clsa_tf.plots import views as views_plot
from tests import tiny
from tests.photos import TINY_FLAGS, write_folder
from tests.test_end_to_end import call, command

IMAGES = 6


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    return write_folder(root, classes=("",), each=IMAGES)


def config_of(photos, **changes):
    return tiny.config(dataset=f"folder:{photos}", **changes)


def batch_of(photos, *views):
    config = config_of(photos)
    source = open_train_source(config)
    return views_plot.first_batch(config, source, views, IMAGES)


def with_pillow(image, caption):
    """Applies the operation of a caption; u8[H,W,3] -> u8[H,W,3]."""
    if caption == "no operation":
        return image
    name, _, words = caption.partition(" ")
    number = words.split(" ")[0].rstrip("%°")
    number = float(number) if number else None
    image = Image.fromarray(image)
    pixels = int((number or 0) / 100 * image.width)

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix)

    enhance = getattr(ImageEnhance, name, None)
    if enhance:
        return np.asarray(enhance(image).enhance(number))
    result = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Identity": lambda: image,
        "Invert": lambda: ImageOps.invert(image),
        "rotation": lambda: image.rotate(number),
        "solarized": lambda: ImageOps.solarize(image, 128),
        "Posterize": lambda: ImageOps.posterize(image, int(number)),
        "Rotate": lambda: image.rotate(number),
        "ShearX": lambda: affine(1, number, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, number, 1, 0),
        "Solarize": lambda: ImageOps.solarize(image, int(number)),
        "TranslateX": lambda: affine(1, 0, pixels, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, pixels),
    }[name]()
    return np.asarray(result)


def assert_same_picture(actual, expected, words):
    """Ignores isolated pixels: captions are rounded, which moves edges."""
    wrong = np.abs(actual.astype(int) - expected).max(axis=-1) > 2
    assert wrong.mean() < 0.02, words


@pytest.mark.slow
def test_captions_describe_the_view_of_their_row(photos):
    # Without the parts of the weak chain that captions leave out.
    bare = dict(jitter_probability=0, gray=0, blur=0, flip=0)
    size = dict(size=20, min_area=0.3, max_area=1)
    more = dict(rotation=True, solarize=0.5, strong_ops=4, shuffle=True)
    # The draw of the crop does not depend on later parts.
    plain = View("x", **size, **bare)
    hard = View("x", **size, **bare, **more)
    weak = batch_of(photos, plain)
    batch = batch_of(photos, hard)
    captions = views_plot.captions(batch, hard)
    made = views_plot.unshuffled(batch, hard, batch["x"])
    assert views_plot.captions(weak, plain) == [[]] * IMAGES
    # The rows were shuffled, and the captions differ.
    assert list(batch["x_order"]) != list(range(IMAGES))
    assert len({tuple(words) for words in captions}) == IMAGES
    every = {word.split(" ")[0] for words in captions for word in words}
    assert {"rotation", "solarized"} < every
    for image, words, result in zip(weak["x"].numpy(), captions, made):
        for word in words:
            image = with_pillow(image, word)
        assert_same_picture(result, image, words)


@pytest.mark.slow
def test_captions_state_the_share_of_a_texture(photos):
    view = View("x", 20, 0.3, 1, texture=0.5)
    batch = batch_of(photos, view)
    drawn = unpack(batch["x_params"], view)["texture"]
    expected = [
        [f"texture {100 * (64 - alpha) / 64:.0f}%"] if applied else []
        for applied, alpha in zip(drawn["apply"], drawn["alpha"].numpy())
    ]
    assert views_plot.captions(batch, view) == expected
    assert [] in expected and len({tuple(x) for x in expected}) > 2


@pytest.mark.parametrize("name", strong.NAMES)
def test_levels_show_their_parameter(name):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, [5, 5, 3], dtype=np.uint8))
    image = np.asarray(coarse.resize([40, 40], Image.Resampling.BICUBIC))
    cells = views_plot.operation(image, name)
    assert len(cells) == (1 if STRONG_OPS[name].parameter is None else 9)
    for shown, (words,), _ in cells:
        if STRONG_OPS[name].parameter is None:
            assert words == "no level"
            words = ""
        expected = with_pillow(image, f"{name} {words}")
        assert_same_picture(shown, expected, words)


@pytest.mark.slow
def test_rows_show_one_image_and_unreadable_ones_are_left_out(tmp_path):
    # Each image has another width and another grey level.
    levels = [20, 80, 140, 200]
    for level in levels:
        image = Image.new("RGB", (60 + level, 40), (level,) * 3)
        image.save(tmp_path / f"{level}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    config = config_of(tmp_path, max_bad_share=1.0)
    source = open_train_source(config)
    views = [View("x", 16, 1, 1, shuffle=True)]
    batch = views_plot.first_batch(config, source, views, 5)
    originals = views_plot.first_images(config, source, 5)
    grid = views_plot.views_grid("moco", views, batch, originals)
    assert grid.columns == ["image\n", "x\n16 px"] and len(grid.cells) == 4
    # A crop of the whole area has a wrong aspect ratio: it becomes central.
    centers = {60 + level: (60 + level - 53) // 2 for level in levels}
    boxes = unpack(batch["x_params"], views[0])["box"].numpy()
    seen = []
    for (image, (size,), _), (view, words, _) in grid.cells:
        level = int(image[0, 0, 0])
        seen.append(level)
        assert size == f"{60 + level} x 40 px" and words == []
        rows = [x for x in range(5) if (batch["x"][x] == view).numpy().all()]
        assert {boxes[row][1] for row in rows} == {centers[60 + level]}
    assert sorted(seen) == levels


@pytest.mark.slow
def test_picture_of_a_run_shows_the_images_of_its_batch(tmp_path, monkeypatch):
    for level in range(0, 250, 10):  # widths and grey levels differ
        image = Image.new("RGB", (60 + level, 40), (level,) * 3)
        image.save(tmp_path / f"{level}.png")
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    config = config_of(tmp_path, batch_size=8, max_bad_share=1.0)
    source = open_train_source(config)
    views = (View("x", 16, 1, 1, jitter_probability=0, gray=0, blur=0),)
    batches = training_batches(
        source,
        views,
        batch_size=8,
        seed=config.seed,
        start_step=0,
        unreadable=UnreadableImages(max_bad_share=1.0),
        keep_params=True,
    )
    grids = []
    monkeypatch.setattr(sheet, "sheet", lambda *x: grids.extend(x[0]))
    for step, batch in zip(range(3), batches):
        views_plot.draw_batch(config, source, views, batch, step, "a.png")
        assert len(grids[-1].cells) == views_plot.ROWS
    shown = []
    for (image, (size,), _), (view, _, _) in sum((g.cells for g in grids), []):
        level = int(image[0, 0, 0])
        assert size == f"{60 + level} x 40 px" and (view == level).all()
        shown.append(level)
    assert len(set(shown)) == 18 and 0 not in shown


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.names())
def test_every_method_has_a_picture(method, photos, tmp_path):
    path = tmp_path / "views.png"
    config = config_of(photos, method=method)
    picture = views_plot.gallery(config, str(path), images=2)
    image = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(image, picture)
    # Two rows of at least 120 px, and some of the image is not white.
    assert image.shape[0] > 240 and image.shape[1] > 360
    assert 0.1 < (image < 250).any(axis=-1).mean() < 0.9
    assert (image[:, -4:] == 255).all() and (image[-4:] == 255).all()
    assert [p.name for p in tmp_path.iterdir()] == ["views.png"]


def test_text_overlaps_no_picture_and_no_other_column(tmp_path):
    red = np.tile(np.uint8([255, 0, 0]), [30, 30, 1])
    lines = ["TranslateX -27%"] * 3  # one of the longest
    cell = sheet.Cell(red, lines)
    grid = sheet.Grid(
        "title",
        ["strong 0\n96 px", "strong 1\n96 px"],
        ["Brightness", "AutoContrast"],
        [[cell, cell], [cell, cell]],
        120,
    )
    image = sheet.sheet([grid], str(tmp_path / "a.png"))
    is_red = (image == [255, 0, 0]).all(axis=-1)
    is_text = (image < 128).all(axis=-1)
    assert is_text.sum() > 500
    assert is_red.sum() == 4 * 120**2
    beside = ~is_red.any(axis=0)
    # Labels are left of the pictures; between and right of them is no text.
    left = np.argmin(beside)
    assert is_text[:, :left].any()
    assert not is_text[:, left:][:, beside[left:]].any()


@pytest.mark.slow
def test_command_draws_and_prints_the_path(photos, tmp_path):
    path, workdir = tmp_path / "views.png", tmp_path / "run"
    result = call(
        command(
            "clsa_tf.gallery",
            *TINY_FLAGS,
            f"--dataset=folder:{photos}",
            f"--workdir={workdir}",
            f"--output={path}",
            "--images=64",  # more than there are
        )
    )
    assert result.stdout == f"{path}\n"
    assert result.stderr == "drawing views …\n"
    assert path.stat().st_size > 5000
    assert not workdir.exists()
    assert tf.io.decode_png(tf.io.read_file(str(path))).shape[1] > 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--output={tmp}/no/views.png"],
            ["--output", "No such", "no/views"],
        ),
        (["--output={tmp}/views.png", "--images=0"], ["images", "1, 64"]),
        (["--output={tmp}/views.png"], ["--dataset"]),
        (
            [
                "--output={tmp}/v.png",
                "--dataset=shapes",
                "--data_dir={tmp}",
            ],
            ["224 px", "shapes"],
        ),
    ],
)
def test_wrong_flags_are_reported_without_a_traceback(flags, words, tmp_path):
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    error = call(command("clsa_tf.gallery", *flags), status=1).stderr
    for word in words:
        assert word in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_output_has_to_be_a_writable_png_file(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("views.jpg", "folder.png", "file/views.png", "a/b.png"):
        with pytest.raises(UserError, match=f"--output .*{name}"):
            gallery.check_output(str(tmp_path / name))
    for name in ("old.png", "old.png.tmp"):
        (tmp_path / name).write_text("old")
    gallery.check_output(str(tmp_path / "old.png"))
    for name in ("old.png", "old.png.tmp"):
        assert (tmp_path / name).read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 4
