"""The examples, started as scripts, on few and small images."""

import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorflow import keras

from clsa_tf.data.shapes import dataset
from clsa_tf.networks import functional
from clsa_tf.networks.heads import Head
from tests import runs
from tests.marks import slow_but
from tests.photos import write_folder


@pytest.fixture(scope="module")
def script_environment():
    """An environment in which scripts find the package, installed or not."""
    return runs.environment() | {"PYTHONPATH": os.getcwd()}


def call(script, script_environment, *arguments, status=0):
    result = subprocess.run(
        [sys.executable, f"examples/{script}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=script_environment,
        timeout=900,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result


class FewShapes(dataset.Shapes, skip_registration=True):
    """The embedded dataset with few images."""

    name = "shapes"
    EXAMPLES = {"train": 120, "test": 10}


@pytest.mark.slow
def test_pretrain_example_finds_similar_images(
    photos, script_environment, tmp_path
):
    runs.leave_out_pictures(tmp_path / "run")
    shutil.copytree(photos, tmp_path / "photos")
    bad = tmp_path / "photos" / "dark" / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff\xe0 cut short")
    (tmp_path / "photos" / "notes.txt").write_text("none of them")
    arguments = [
        f"--images={tmp_path / 'photos'}",
        f"--workdir={tmp_path / 'run'}",
        "--epochs=1",
        "--batch_size=16",
        "--image_size=32",
    ]
    printed = call("pretrain.py", script_environment, *arguments).stdout
    pairs = re.findall(r"/(\w+)/\d+.jpg is most like .*?/(\w+)/\d+", printed)
    assert len(pairs) == 5
    assert all(one == other for one, other in pairs)  # bright, dark
    assert printed.count("cannot be read") == 1 and f": {bad}\n" in printed


@pytest.mark.slow
def test_examples_report_missing_folders_and_encoders(
    script_environment, tmp_path
):
    folder = f"--images={tmp_path / 'none'}"
    arguments = [folder, f"--workdir={tmp_path / 'run'}"]
    error = call("pretrain.py", script_environment, *arguments, status=1).stderr
    assert error.startswith("error: ") and str(tmp_path / "none") in error
    arguments = [folder, f"--encoder={tmp_path / 'none'}"]
    error = call("finetune.py", script_environment, *arguments, status=1).stderr
    assert error.startswith("error: Expected ") and error.count("\n") == 1


@pytest.mark.slow
def test_pretrain_example_trains_on_images_of_other_formats(
    script_environment, tmp_path, monkeypatch
):
    """It cannot search for similar images among them, and reports that."""
    monkeypatch.setitem(script_environment, "HOME", str(tmp_path))
    write_folder(tmp_path / "photos", each=20)
    for path in (tmp_path / "photos").rglob("*.jpg"):
        Image.open(path).save(path.with_suffix(".webp"))
        path.unlink()
    runs.leave_out_pictures(tmp_path / "run")
    arguments = ["--images=~/photos", f"--workdir={tmp_path / 'run'}"]
    arguments += ["--epochs=1", "--batch_size=16", "--image_size=32"]
    error = call("pretrain.py", script_environment, *arguments, status=1).stderr
    assert f"{tmp_path / 'photos'}" in error and "export.embed" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_own_loop_example_reduces_the_loss(script_environment, tmp_path):
    dataset.prepare(str(tmp_path), builder_class=FewShapes)
    arguments = [f"--data_dir={tmp_path}", "--steps=30", "--batch_size=32"]
    printed = call("own_loop.py", script_environment, *arguments).stdout
    contrasts = [float(x) for x in re.findall(r"contrast ([\d.]+)", printed)]
    assert len(contrasts) == 3
    assert max(contrasts) < math.log(32) - 0.2  # chance-level loss


@pytest.mark.slow
def test_finetune_example_classifies_images(
    exported, photos, script_environment, tmp_path
):
    output = tmp_path / "classifier.keras"
    printed = call(
        "finetune.py",
        script_environment,
        f"--encoder={exported.base}",
        f"--images={photos}",
        f"--output={output}",
        "--epochs=5",
    ).stdout
    assert "32 x 32 px" in printed  # the size of the export
    accuracies = dict(re.findall(r"accuracy, (.*?) +([\d.]+)%", printed))
    assert list(accuracies) == [
        "linear classifier",
        "fine-tuned",
        "from scratch",
    ]
    # Bright and dark photographs are easy to distinguish.
    assert float(accuracies["fine-tuned"]) > 75
    model = keras.models.load_model(output)
    levels = np.float32([190, 60])[:, np.newaxis, np.newaxis, np.newaxis]
    blank = np.broadcast_to(levels, [2, 32, 32, 3])
    classes = model.predict(blank, verbose=0).argmax(axis=1)
    assert classes.tolist() == [0, 1]  # bright, dark


@pytest.mark.slow
def test_detector_example_reduces_the_loss(
    photos, script_environment, tmp_path
):
    encoder = functional.functional(
        backbone="resnet18",
        width=0.125,
        stem="imagenet",
        head=Head(outputs=8),
    )
    encoder.save(tmp_path / "encoder.keras")
    output = tmp_path / "detector.weights.h5"
    printed = call(
        "keras_cv_detector.py",
        script_environment,
        f"--encoder={tmp_path}",
        f"--images={photos}",
        f"--output={output}",
        "--epochs=8",
        "--scenes=16",
        "--image_size=96",
    ).stdout
    losses = [float(x) for x in re.findall(r" loss: ([\d.]+)", printed)]
    assert len(losses) == 8 and losses[-1] < 0.7 * losses[0], losses
    assert len(re.findall(r"true: +(bright|dark) at .* found: ", printed)) == 4
    assert output.stat().st_size > 10**6


def test_a_missing_encoder_is_an_error(photos, script_environment, tmp_path):
    result = call(
        "finetune.py",
        script_environment,
        f"--encoder={tmp_path / 'none'}",
        f"--images={photos}",
        status=1,
    )
    assert str(tmp_path / "none") in result.stderr
    assert not (tmp_path / "classifier.keras").exists()


@pytest.mark.parametrize("folder_exists", slow_but(1, [False, True]))
def test_a_folder_without_images_is_an_error(
    folder_exists, exported, script_environment, tmp_path
):
    folder = tmp_path / "images"
    if folder_exists:
        folder.mkdir()
    arguments = [f"--encoder={exported.base}", f"--images={folder}"]
    error = call("finetune.py", script_environment, *arguments, status=1).stderr
    assert error.startswith("error: ") and "--images" in error
    assert str(folder) in error and error.count("\n") == 1


def test_an_encoder_without_an_image_size_is_an_error(
    photos, script_environment, tmp_path
):
    encoder = functional.functional(
        backbone="resnet18", width=0.125, stem="small", head=Head(outputs=8)
    )
    encoder.save(tmp_path / "encoder.keras")
    arguments = [f"--encoder={tmp_path}", f"--images={photos}"]
    error = call("finetune.py", script_environment, *arguments, status=1).stderr
    assert "--image_size" in error and str(tmp_path) in error
    assert "Traceback" not in error
