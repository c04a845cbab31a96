import json
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf.api import load
from clsa_tf.data.open import open_train_source
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.errors import UserError
from clsa_tf.evaluation.features import compiled
from clsa_tf.evaluation.task import plan
from export import formats
from tests import exports, runs
from tests.photos import write_folder

PIXELS = exports.noise(3, seed=7)
FILES = {
    "encoder.keras",
    "encoder.weights.h5",
    "encoder_float16.tflite",
    "encoder_int8.tflite",
    "encoder.onnx",
}

# In a process that cannot import clsa_tf: plain Keras reads both files.
CLEAN = """
import sys
import numpy as np
import onnxruntime
from tensorflow import keras
sys.modules["clsa_tf"] = None  # importing it is an error
model = keras.models.load_model(sys.argv[1] + "/encoder.keras")
images = np.load(sys.argv[2])
first = model.predict(images, verbose=0)
weights = model.get_weights()
model.set_weights([0 * w for w in weights])
model.load_weights(sys.argv[1] + "/encoder.weights.h5")
second = model.predict(images, verbose=0)
for name in first:
    np.testing.assert_array_equal(first[name], second[name])
np.savez(sys.argv[3], **first)
"""


def with_dataset(exported, dataset, workdir):
    """Copies the run, with flags that name `dataset`."""
    shutil.copytree(exported.workdir / "checkpoints", workdir / "checkpoints")
    config = config_lib.load(str(exported.workdir))
    config = config.replace(
        dataset=dataset, workdir=str(workdir), knn_k=5, holdout=0.3
    )
    (workdir / "run.flags").write_text(config_lib.to_flagfile(config))
    return workdir


@pytest.fixture(scope="module")
def run(exported, photos, tmp_path_factory):
    """A run on photographs in two classes."""
    workdir = tmp_path_factory.mktemp("run")
    return with_dataset(exported, f"folder:{photos}", workdir)


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """The directory with all formats, and the output of the command."""
    output = tmp_path_factory.mktemp("formats") / "new"
    result = runs.call(
        runs.command("export.formats", f"--workdir={run}", f"--output={output}")
    )
    for line in result.stderr.splitlines():
        assert "encoder" in line and line.endswith(" …")  # progress
    return output, result.stdout


def assert_close(found, expected, bound):
    for name in ("embedding", "projection"):
        assert found[name].shape == expected[name].shape
        worst = np.abs(found[name] - expected[name]).max()
        assert worst < bound * np.abs(expected[name]).max(), name


def expected(exported, images):
    return {
        "embedding": exported.encoder(images).numpy(),
        "projection": exported.encoder.project(images).numpy(),
    }


@pytest.mark.slow
def test_the_summary_describes_every_file(written):
    output, printed = written
    assert {path.name for path in output.iterdir()} == FILES | {"formats.json"}
    summary = json.loads((output / "formats.json").read_text())
    assert set(summary) == FILES
    for name, found in summary.items():
        assert found["bytes"] == (output / name).stat().st_size
        assert 0 <= found["deviation"] <= found["bound"]
        assert f" {name}: " in printed
        assert found["input"] == {
            "name": "images_0_255",
            "dtype": "uint8" if "int8" in name else "float32",
            "range": [0, 255],
        }
    for name in ("encoder_float16.tflite", "encoder_int8.tflite"):
        knn, before = summary[name]["knn"], summary[name]["knn_float32"]
        assert f"kNN {knn:.1%} (float32: {before:.1%})" in printed
    assert load.image_size(output) == exports.SIZE
    assert load.image_size(output / "encoder.keras") == exports.SIZE
    sizes = [summary[name]["bytes"] for name in sorted(FILES)]
    assert len(set(sizes)) == len(sizes)
    size = {name: summary[name]["bytes"] for name in FILES}
    assert size["encoder_int8.tflite"] < size["encoder_float16.tflite"]
    assert size["encoder_float16.tflite"] < size["encoder.weights.h5"]


@pytest.mark.slow
def test_fingerprint_equals_that_of_the_export(exported, written):
    with open(f"{exported.path}/model_card.json") as file:
        card = json.load(file)
    summary = json.loads((written[0] / "formats.json").read_text())
    assert {x["fingerprint"] for x in summary.values()} == {card["fingerprint"]}


@pytest.mark.slow
def test_plain_keras_loads_the_files(exported, written, tmp_path):
    images = np.tile(PIXELS, [1, 1, 2, 1])  # another shape than at the export
    np.save(tmp_path / "in.npy", np.float32(images))
    paths = [written[0], tmp_path / "in.npy", tmp_path / "out.npz"]
    subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, *paths],
        check=True,
        env=runs.environment(),
    )
    found = np.load(tmp_path / "out.npz")
    assert_close(found, expected(exported, images), formats.ROUNDING)


def tflite(path):
    interpreter = tf.lite.Interpreter(str(path))
    return interpreter, interpreter.get_signature_runner()


@pytest.mark.slow
def test_float16_equals_the_encoder(exported, written):
    interpreter, embed = tflite(written[0] / "encoder_float16.tflite")
    (given,) = interpreter.get_input_details()
    assert given["dtype"] == np.float32
    assert given["shape_signature"].tolist() == [1, 32, 32, 3]
    for image in PIXELS[:, np.newaxis]:
        found = embed(images_0_255=np.float32(image))
        assert_close(found, expected(exported, image), formats.HALF)


@pytest.mark.slow
def test_float16_accepts_larger_batches(exported, written):
    path = str(written[0] / "encoder_float16.tflite")
    interpreter = tf.lite.Interpreter(path)
    (given,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(given["index"], PIXELS.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], np.float32(PIXELS))
    interpreter.invoke()
    found = [
        interpreter.get_tensor(x["index"])
        for x in interpreter.get_output_details()
    ]
    wanted = expected(exported, PIXELS)["embedding"]
    (embedding,) = [x for x in found if x.shape == wanted.shape]
    scale = np.abs(wanted).max()
    assert np.abs(embedding - wanted).max() < formats.HALF * scale


@pytest.mark.slow
def test_int8_computes_with_integers_and_accepts_bytes(
    exported, written, photos
):
    interpreter, embed = tflite(written[0] / "encoder_int8.tflite")
    (given,) = interpreter.get_input_details()
    assert given["dtype"] == np.uint8
    scale, zero = given["quantization"]
    assert scale == pytest.approx(1, rel=1e-6) and zero == 0
    outputs = interpreter.get_output_details()
    assert {x["dtype"] for x in outputs} == {np.float32}
    # There are no other floating-point tensors inside.
    floats = [
        x["index"]
        for x in interpreter.get_tensor_details()
        if np.issubdtype(x["dtype"], np.floating)
    ]
    assert sorted(floats) == sorted(x["index"] for x in outputs)
    for path in sorted(photos.rglob("*.jpg"))[::10]:
        image = tf.io.decode_jpeg(tf.io.read_file(str(path)))[tf.newaxis]
        image = tf.cast(tf.image.resize(image, [32, 32]), tf.uint8)
        wanted, found = expected(exported, image), embed(images_0_255=image)
        for name, value in wanted.items():
            assert (
                formats.one_minus_cosine(found[name], value) < formats.QUANTISED
            )


@pytest.mark.slow
def test_accuracy_equals_that_of_the_runs_evaluation(exported, run, written):
    config = config_lib.load(str(run))
    unreadable = UnreadableImages(max_bad_share=0.0)
    task = plan(config, open_train_source(config)).task(unreadable)
    summary = json.loads((written[0] / "formats.json").read_text())
    embed = tflite(written[0] / "encoder_int8.tflite")[1]

    def quantised(images):
        rows = [embed(images_0_255=x[tf.newaxis])["embedding"] for x in images]
        return tf.concat(rows, axis=0)

    found = summary["encoder_int8.tflite"]
    assert found["knn"] == task.accuracy(quantised)
    assert found["knn_float32"] == task.accuracy(compiled(exported.encoder))
    num_queries = sum(len(labels) for _, labels in task.queries)
    assert found["knn_images"] == num_queries > 10


@pytest.mark.slow
def test_without_its_package_only_onnx_is_left_out(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    formats.export(str(run), str(tmp_path), formats=["onnx", "weights"])
    printed = capsys.readouterr().out
    (line,) = [x for x in printed.splitlines() if "encoder.onnx" in x]
    assert "tf2onnx" in line and "pip install 'clsa_tf[onnx]'" in line
    assert (tmp_path / "encoder.weights.h5").exists()
    # Without any other format it is an error.
    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"\bonnx\b.*--formats"):
        formats.export(str(run), str(other), formats=["onnx"])
    assert list(other.iterdir()) == []


@pytest.mark.slow
def test_onnx_equals_the_encoder(exported, written):
    session = onnxruntime.InferenceSession(
        str(written[0] / "encoder.onnx"), providers=["CPUExecutionProvider"]
    )
    images = np.tile(PIXELS, [1, 1, 2, 1])
    names = ["embedding", "projection"]
    found = session.run(names, {"images_0_255": np.float32(images)})
    assert_close(
        dict(zip(names, found)), expected(exported, images), formats.ROUNDING
    )


@pytest.mark.slow
def test_a_file_that_differs_is_not_published(run, tmp_path, monkeypatch):
    (tmp_path / "encoder.keras").write_text("the one before")
    impossible = formats.FORMATS["keras"]._replace(bound=-1.0)
    monkeypatch.setitem(formats.FORMATS, "keras", impossible)
    with pytest.raises(UserError, match="encoder.keras.* -1 .*share of larg"):
        formats.export(str(run), str(tmp_path), formats=["keras"])
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.keras"]
    assert (tmp_path / "encoder.keras").read_text() == "the one before"


@pytest.mark.slow
def test_a_loss_of_accuracy_is_not_published(run, tmp_path, monkeypatch):
    weights = formats.FORMATS["weights"]._replace(lossy=True)
    monkeypatch.setitem(formats.FORMATS, "weights", weights)
    found = formats.export(
        str(run), str(tmp_path / "a"), formats=["weights"], knn=5
    )
    found = found["encoder.weights.h5"]
    assert found["knn"] == found["knn_float32"] and found["knn_images"] <= 5
    monkeypatch.setattr(formats, "KNN_LOSS", -1.5)
    with pytest.raises(UserError, match="encoder.weights.h5.*%.*kNN"):
        formats.export(str(run), str(tmp_path / "b"), formats=["weights"])
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.slow
def test_data_are_read_only_where_they_are_needed(
    exported, photos, tmp_path, capsys
):
    (tmp_path / "run").mkdir()
    run = with_dataset(exported, "folder:/no/such/folder", tmp_path / "run")
    output = tmp_path / "new"
    formats.export(str(run), str(output), formats=["weights"])
    with pytest.raises(UserError, match="/no/such/folder"):
        formats.export(str(run), str(output), formats=["tflite_int8"])
    dark = str(photos / "dark")  # nothing near white
    found = formats.export(
        str(run), str(output), formats=["tflite_int8"], images=dark
    )
    assert "/no/such/folder" in capsys.readouterr().out
    assert "knn" not in found["encoder_int8.tflite"]
    interpreter, _ = tflite(output / "encoder_int8.tflite")
    scale, zero = interpreter.get_input_details()[0]["quantization"]
    assert scale == pytest.approx(1, rel=1e-6) and zero == 0
    # The summary still has the file of the first call.
    summary = json.loads((output / "formats.json").read_text())
    assert set(summary) == {"encoder.weights.h5", "encoder_int8.tflite"}


def test_too_few_photos_are_rejected(run, tmp_path):
    folder = write_folder(tmp_path / "photos", classes=[""], each=1)
    with pytest.raises(UserError, match=f" 2 images.*{folder}.* 1;"):
        formats.export(
            str(run),
            str(tmp_path / "new"),
            formats=["tflite_int8"],
            images=str(folder),
        )


def test_unknown_formats_are_rejected(run, tmp_path):
    result = runs.call(
        runs.command(
            "export.formats",
            f"--workdir={run}",
            f"--output={tmp_path}",
            "--formats=keras,h5",
        ),
        status=1,
    )
    for value in ("keras, weights, ", "'keras,h5'", "--formats"):
        assert value in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_deviations_are_measured():
    one, other = np.float32([[3, 4], [1, 0]]), np.float32([[3, 4], [0, 2]])
    assert formats.one_minus_cosine(one, one) == pytest.approx(0)
    assert formats.one_minus_cosine(one, other) == pytest.approx(1)
    assert formats.share_of_largest(one, other) == pytest.approx(0.5)
