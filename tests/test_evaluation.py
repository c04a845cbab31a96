"""The images that a run is evaluated on, and the picture of neighbours."""

import json
import os
import re
import shutil
import sys
import warnings

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from clsa_tf import config as config_lib
from clsa_tf import report
from clsa_tf.api import load
from clsa_tf.data.open import open_train_source
from clsa_tf.data.sources import dataset_writer
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.errors import UserError
from clsa_tf.evaluation import protocols
from clsa_tf.evaluation import task as task_lib
from clsa_tf.evaluation.task import announcement, plan
from clsa_tf.plots import neighbours, sheet
from clsa_tf.text import abbreviated, listed, printable
from tests import exports, tiny
from tests.photos import write_folder
from tests.test_api import PIXELS, of


def planned(dataset, **changes):
    """Returns training images, evaluation and the announcement of a run."""
    changes = {"image_size": 32, "eval_keep": 1.0, "knn_k": 3} | changes
    config = tiny.config(dataset=dataset, **changes)
    train = open_train_source(config)
    evaluation = plan(config, train) if config.knn_epochs else None
    return train, evaluation, announcement(config, train, evaluation)


def names_of(source):
    examples = source.examples(start=0, seed=0, shuffle=False, repeat=False)
    return [e["name"].decode() for e in examples.as_numpy_iterator()]


@pytest.fixture
def flat(tmp_path):
    return write_folder(tmp_path / "flat", classes=("",), each=20)


@pytest.fixture
def animals(tmp_path):
    """Labelled images, of classes that no other folder has."""
    return write_folder(tmp_path / "animals", classes=("cat", "dog"), each=5)


# ---- Images


def test_held_out_images_are_announced(photos):
    train, evaluation, lines = planned(f"folder:{photos}")
    assert evaluation.bank is train and evaluation.has_accuracy
    assert evaluation.bank_size == train.size
    held = set(names_of(evaluation.queries))
    assert held and not held & set(names_of(train))
    assert lines == [
        f"folders are used as 2 classes (bright, dark): {len(held)} of 60 "
        "images are held out for the kNN accuracy; --labels=none or "
        "--holdout=0 trains on all"
    ]
    _, _, lines = planned(f"folder:{photos}", knn_epochs=0)
    assert "held out for the report" in lines[0]
    assert "--knn_epochs=0" in lines[1]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"labels": "none"}, ["--labels=none"]),
        ({"holdout": 0.0}, ["--holdout=0 keeps none of the 60"]),
    ],
)
def test_without_evaluation_all_images_are_trained_on(photos, changes, words):
    train, evaluation, lines = planned(f"folder:{photos}", **changes)
    assert train.size == 60 and train.held_out == 0
    assert evaluation.bank is train and evaluation.queries is None
    assert f"no kNN accuracy: {evaluation.no_accuracy}" == lines[-1]
    for word in words:
        assert word in lines[-1]


def test_a_stray_image_is_named(animals):
    before = planned(f"folder:{animals}", labels="none")[0]
    image = Image.fromarray(exports.noise(1)[0])
    image.save(os.fsencode(str(animals)) + b"/\xff\n" + 60 * b"x" + b".jpg")
    train, _, lines = planned(f"folder:{animals}")
    assert train.size == before.size + 1  # all are trained on
    (line,) = lines
    assert "1 image lies beside its 2 folders" in line
    assert "move every image into one" in line
    # The line can be printed.
    assert "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}xx" in line
    assert "…" in line and ".jpg" in line and line.encode() and "\n" not in line


def test_files_left_out_of_the_evaluation_set_are_named(animals, flat):
    (animals / "cat" / "clip.mp4").write_bytes(b"no image")
    _, _, lines = planned(f"folder:{flat}", eval_dataset=f"folder:{animals}")
    (left_out_line, knn_line) = lines
    assert f"left out of {animals}: 1 file: 1 .mp4" in left_out_line
    assert knn_line.startswith("kNN accuracy of 10 images")


def stray(folder):
    """Adds an image next to the class folders."""
    Image.fromarray(exports.noise(1)[0]).save(folder / "stray.jpg")


def test_a_stray_image_is_named_with_any_evaluation(animals, tmp_path):
    words = "1 image lies beside its 2 folders (stray.jpg)"
    other = write_folder(tmp_path / "mine", classes=("cat", "dog"), each=3)
    stray(other)
    _, _, lines = planned(f"folder:{other}", eval_dataset=f"folder:{animals}")
    assert words in lines[-1]
    _, _, lines = planned(f"folder:{other}", knn_epochs=0)
    assert words in lines[-1]


@pytest.mark.parametrize("where", ["train", "val"])
def test_a_stray_image_in_one_of_two_splits_is_named(tmp_path, where):
    for split in ("train", "val"):
        write_folder(tmp_path / split, classes=("cat", "dog"), each=3)
    stray(tmp_path / where)
    words = "1 image lies beside its 2 folders (stray.jpg)"
    _, _, lines = planned(f"folder:{tmp_path}")
    assert words in lines[-1]
    if where == "val":
        with pytest.raises(UserError, match=re.escape(words)):
            planned(f"folder:{tmp_path}", eval_split="val")


@pytest.mark.parametrize("labels", ["auto", "none"])
def test_images_of_other_classes_are_searched_among_each_other(
    flat, animals, labels
):
    train, evaluation, lines = planned(
        f"folder:{flat}", eval_dataset=f"folder:{animals}", labels=labels
    )
    assert train.class_names is None and train.size == 20
    assert evaluation.queries is None and evaluation.bank_size == 10
    assert len(names_of(evaluation.bank)) == 10
    (line,) = lines
    assert (
        f"of 10 images of folder:{animals}, each compared with all others"
        in line
    )
    task = evaluation.task(UnreadableImages(max_bad_share=0.0))
    (bank, labels_), _ = task.features(tiny_features)
    right = 0
    for i, row in enumerate(bank):
        cosines = bank @ row / np.linalg.norm(bank, axis=1)
        cosines[i] = -np.inf
        votes = np.bincount(labels_[np.argsort(-cosines)[:1]], minlength=2)
        right += votes.argmax() == labels_[i]
    task = evaluation.task(UnreadableImages(max_bad_share=0.0))
    task._config = task._config.replace(knn_k=1)
    assert task.accuracy(tiny_features) == pytest.approx(right / 10)


def tiny_features(images):
    """Deterministic features, because they are computed twice."""
    return tf.cast(images[:, ::8, ::8, 0], tf.float32)[..., 0]


@pytest.mark.parametrize("fit", [True, False])
def test_images_that_fit_in_memory_are_decoded_once(fit, animals, monkeypatch):
    """10 of them, read before and after a file is removed."""
    size = 10 * 32 * 32 * 3
    monkeypatch.setattr(task_lib, "CACHE_BYTES", size if fit else size - 1)
    _, evaluation, _ = planned(f"folder:{animals}", holdout=0.0)
    task = evaluation.task(UnreadableImages(max_bad_share=1.0))
    before, _ = task.features(tiny_features)
    (animals / "cat" / "000.jpg").unlink()
    after, _ = task.features(tiny_features)
    assert len(before[0]) == 10 and len(after[0]) == (10 if fit else 9)
    if fit:
        np.testing.assert_array_equal(after[0], before[0])


def test_images_of_other_classes_are_searched_among_their_training_split(
    flat, tmp_path
):
    root = tmp_path / "animals"
    write_folder(root / "train", classes=("cat", "dog"), each=5)
    write_folder(root / "val", classes=("cat", "dog"), each=3)
    _, evaluation, lines = planned(
        f"folder:{flat}", eval_dataset=f"folder:{root}"
    )
    assert all("/train/" in name for name in names_of(evaluation.bank))
    assert all("/val/" in name for name in names_of(evaluation.queries))
    assert "of 6 images" in lines[0] and "among those of" in lines[0]


def test_images_of_the_same_classes_are_searched_among_the_training_images(
    animals, tmp_path
):
    test = write_folder(tmp_path / "test", classes=("cat", "dog"), each=4)
    train, evaluation, lines = planned(
        f"folder:{animals}", eval_dataset=f"folder:{test}", holdout=0.5
    )
    assert evaluation.bank is train and evaluation.queries.size == 8
    assert f"{train.held_out} of 10 images are held out and not" in lines[0]
    assert "--holdout=0" in lines[0]
    assert "of 8 images" in lines[1] and "training images" in lines[1]


def test_unlabelled_evaluation_sets_give_their_reason(photos, flat, tmp_path):
    _, evaluation, _ = planned(
        f"folder:{photos}", eval_dataset=f"folder:{flat}"
    )
    assert f"no labels in {flat}: " in evaluation.no_accuracy
    assert not evaluation.has_accuracy and evaluation.bank_size == 0
    dataset_writer.write(of(PIXELS), tmp_path / "written")
    files = f"tfrecord:{dataset_writer.pattern(tmp_path / 'written')}"
    _, evaluation, lines = planned(f"folder:{photos}", eval_dataset=files)
    assert "is negative in all records" in lines[-1]
    dataset_writer.write(of((PIXELS, np.arange(40) % 3)), tmp_path / "labelled")
    files = f"tfrecord:{dataset_writer.pattern(tmp_path / 'labelled')}"
    _, evaluation, lines = planned(files)
    assert "training uses all images of " in lines[-1]
    assert "--eval_dataset" in lines[-1]


# ---- The report


class NearestMean:
    """A protocol, in place of a module: the nearest mean of a class."""

    TITLE = "mean"

    @staticmethod
    def accuracy(bank, queries, *, own, config):
        assert own is None and config.method == "clsa"
        (rows, labels), (others, wanted) = bank, queries
        means = np.stack([rows[labels == i].mean(axis=0) for i in (0, 1)])
        distances = np.linalg.norm(others[:, None] - means, axis=2)
        return float(np.mean(distances.argmin(axis=1) == wanted))


@pytest.mark.slow
def test_the_report_evaluates_every_protocol(
    exported, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(protocols.PROTOCOLS, "mean", "toy")
    monkeypatch.setitem(sys.modules, "toy", NearestMean)
    workdir = run_on(exported, photos, tmp_path)
    summary = report.report(workdir)
    report.show(summary)
    printed = capsys.readouterr().out
    # Bright and dark photographs.
    assert summary["mean_pixels"] == 1.0
    assert "mean accuracy, pixels     100.0 %" in printed
    for name in ("untrained", "trained"):
        assert 0 <= summary[f"mean_{name}"] <= 1
        assert f"mean accuracy, {name}" in printed
        assert f"kNN accuracy, {name}" in printed


def run_on(exported, dataset, workdir):
    """Copies the run, with flags that name `dataset`."""
    shutil.copytree(exported.workdir / "checkpoints", workdir / "checkpoints")
    config = config_lib.load(str(exported.workdir))
    config = config.replace(
        dataset=f"folder:{dataset}", workdir=str(workdir), holdout=0.3, knn_k=5
    )
    (workdir / "run.flags").write_text(config_lib.to_flagfile(config))
    return str(workdir)


def grids_of(monkeypatch):
    grids, draw = [], sheet.sheet
    monkeypatch.setattr(
        sheet, "sheet", lambda g, path: grids.extend(g) or draw(g, path)
    )
    return grids


@pytest.mark.slow
def test_an_unlabelled_folder_is_reported_without_accuracy(
    exported, flat, tmp_path, monkeypatch, capsys
):
    for i, name in enumerate((b"\xff\xfe.jpg", "写真 $\\frac{1$.jpg".encode())):
        os.rename(flat / f"{i:03d}.jpg", os.fsencode(str(flat)) + b"/" + name)
    grids = grids_of(monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Gg]lyph.*")
        workdir = run_on(exported, flat, tmp_path)
        summary = report.report(workdir)
        report.show(summary)
    why = f"no labels in {flat}: there are no folders in it"
    assert summary["knn_trained"] is None
    assert why in summary["no_knn_because"]
    assert f"no kNN accuracy: {why}" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    picture = np.asarray(Image.open(tmp_path / "neighbours.png"))
    assert picture.shape[1] > 900
    # An image is not its own neighbour; the nearest one comes first.
    for query, *others in grids[0].cells:
        files = [cell.lines[0] for cell in others]
        assert len(set(files)) == 8 and query.lines[0] not in files
        cosines = [float(cell.lines[1].split()[1]) for cell in others]
        assert cosines == sorted(cosines, reverse=True)
        assert {cell.frame for cell in others} == {""}
    assert len(grids[0].cells) == 6
    (title,) = {grid.title for grid in grids}
    assert f"20 images of folder:{flat}"[:30] in title


@pytest.mark.slow
def test_neighbours_are_named_and_marked(
    exported, photos, tmp_path, monkeypatch
):
    grids = grids_of(monkeypatch)
    summary = report.report(run_on(exported, photos, tmp_path))
    assert summary["no_knn_because"] is None and summary["knn_pixels"] == 1
    by_pixels = set()
    for query, *others in grids[0].cells:
        for cell in (query, *others):
            # Whether the image is bright, and its caption.
            by_pixels.add((cell.image.mean() > 125, cell.lines[0]))
            assert cell.lines[1].endswith(".jpg")
        for cell in others:
            same = cell.lines[0] == query.lines[0]
            assert cell.frame == (
                neighbours.RIGHT if same else neighbours.WRONG
            )
            assert -1 <= float(cell.lines[2].removeprefix("cosine ")) <= 1
    assert by_pixels == {(True, "bright"), (False, "dark")}
    # The frames are drawn.
    picture = np.asarray(Image.open(tmp_path / "neighbours.png").convert("RGB"))
    frames = [cell.frame for row in grids[0].cells for cell in row]
    for colour in set(frames) - {""}:
        channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        found = (picture == channels).all(axis=-1).sum()
        assert found > 600 * frames.count(colour)


def test_sheet_abbreviates_lines_that_are_too_long(tmp_path):
    white = np.full([30, 30, 3], 255, np.uint8)
    cell = sheet.Cell(white, ["W" * 80, "i" * 80], "red")
    grid = sheet.Grid("t", ["a", "b"], ["", ""], [[cell] * 2] * 2, 100)
    image = sheet.sheet([grid], str(tmp_path / "a.png"))
    assert image.shape[1] < 250
    # Between the columns, and to the right of them, there is no text.
    frames = np.flatnonzero((image == [255, 0, 0]).all(axis=-1).any(axis=0))
    dark = (image < 128).all(axis=-1)
    assert dark.sum() > 200
    assert not dark[:, 109:115].any() and not dark[:, frames[-1] + 1 :].any()


@pytest.mark.parametrize("kind", ["run", "version", "versions"])
def test_image_size_of_runs_and_exports_is_found(
    exported, tmp_path, kind, monkeypatch
):
    path = {
        "run": exported.workdir,
        "version": exported.path,
        "versions": exported.base,
    }[kind]
    assert load.image_size(path) == exports.SIZE
    monkeypatch.setenv("HOME", os.path.dirname(path))
    assert load.image_size(f"~/{os.path.basename(path)}") == exports.SIZE
    assert load.image_size(tmp_path) is None
    (tmp_path / "encoder.keras").touch()
    for text in ("", "[]", "{}", '{"encoder.keras": {"image_size": "a"}}'):
        (tmp_path / "formats.json").write_text(text)
        assert load.image_size(tmp_path) is None


# ---- Text


def test_names_are_abbreviated_in_the_middle():
    def short(text):
        return len(text) <= 7

    assert abbreviated("a.jpg", short) == "a.jpg"
    assert abbreviated("abcdefgh.jpg", short) == "abc…jpg"
    assert abbreviated("abc", lambda text: False) == "…"
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcdef")) == "a, b, c, …"
    assert printable(b"a\xff\n\x1b") == "a" + 3 * "\N{REPLACEMENT CHARACTER}"
    assert printable("a\udcff") == "a\N{REPLACEMENT CHARACTER}"
