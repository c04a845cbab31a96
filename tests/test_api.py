"""Pretraining from Python gives the result of the command line."""

import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow import keras

import clsa_tf
from clsa_tf import config as config_lib
from clsa_tf import methods
from clsa_tf.api.pretrain import make_config
from clsa_tf.cli import flagfiles, list_methods
from clsa_tf.data.decode import decode
from clsa_tf.data.open import open_source
from clsa_tf.data.sources import dataset_writer
from clsa_tf.errors import UserError
from clsa_tf.options.fields import Crop
from tests import runs
from tests.exports import encode, noise
from tests.photos import TINY_FLAGS

# A command's run is compared.
pytestmark = pytest.mark.usefixtures("rewritten_graphs")

# The settings of TINY_FLAGS, as Python arguments.
SETTINGS = dict(
    backbone="resnet18",
    width=0.125,
    projection_size=16,
    key_crop=Crop(24, 0.3, 1.0),
    query_crops="24:0.3:1",
    strong_crops=[Crop(16, 0.2, 0.6)],
    queue_size=40,
    batch_size=16,
    total_epochs=3,
    image_size=32,
    eval_keep=1,
    log_steps=2,
    knn_k=np.int64(5),
)
PIXELS = noise(40, size=24)


def parse(*arguments):
    return config_lib.parse(arguments)


def assert_equal_weights(one, two):
    assert len(one.weights) == len(two.weights) > 50
    for mine, other in zip(one.weights, two.weights):
        assert mine.name == other.name
        np.testing.assert_array_equal(mine, other)


# ---- Settings


@pytest.mark.parametrize(
    "settings, arguments",
    [
        (SETTINGS, TINY_FLAGS),
        ({}, []),
        (
            {"method": "moco", "jit_compile": True, "base_lr": 1e-3},
            ["--method=moco", "--jit_compile", "--base_lr=0.001"],
        ),
        (
            {"flagfile": pathlib.Path("configs/quickstart.flags"), "width": 1},
            ["--flagfile=configs/quickstart.flags", "--width=1"],
        ),
        (
            {"query_crops": (Crop(24, 0.3, 1.0), "32:0.2:1")},
            ["--query_crops=24:0.3:1,32:0.2:1"],
        ),
    ],
)
def test_settings_equal_flags(photos, settings, arguments):
    config = make_config(photos, workdir=pathlib.Path("a/run"), **settings)
    spelled = [f"--dataset=folder:{photos}", "--workdir=a/run"]
    assert config == parse(*arguments, *spelled)


def test_data_arguments_become_dataset_flags(photos, tmp_path):
    def dataset(data):
        return make_config(data, workdir="run").dataset

    assert dataset(photos) == dataset(str(photos)) == f"folder:{photos}"
    for name in ("cifar10", "shapes", "tfrecord:/a-*", "folder:b", "gs://c/d"):
        assert dataset(name) == name
    (tmp_path / "dataset_info.json").touch()  # of tensorflow-datasets
    assert dataset(tmp_path) == str(tmp_path)
    images = tf.data.Dataset.from_tensor_slices(PIXELS)
    files = f"{os.getcwd()}/run/dataset/images-*.tfrecord"
    assert dataset(images) == f"tfrecord:{files}"
    for data, spelled in (
        (images, f"tfrecord:{os.getcwd()}/run/eval_dataset/images-*.tfrecord"),
        (photos, f"folder:{photos}"),
        ("cifar10", "cifar10"),
        ("", ""),
    ):
        config = make_config("shapes", workdir="run", eval_dataset=data)
        assert config.eval_dataset == spelled


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"batchsize": 3}, ["'batchsize'", "did you mean batch_size?"]),
        ({"zzz": 3}, ["'zzz'", "--help` lists"]),
        ({"batch_size": "many"}, ["--batch_size", "whole number", "'many'"]),
        ({"batch_size": 2.5}, ["--batch_size", "whole number", "'2.5'"]),
        ({"batch_size": None}, ["batch_size", "None", "omit"]),
        ({"base_lr": 0}, ["--base_lr", "above 0", "received 0"]),
        ({"query_crops": (24, 0.3, 1)}, ["size:min_area:max_area"]),
        ({"method": "mocco"}, ["--method", "clsa", "'mocco'"]),
        ({"method": "moco", "strong_ops": 3}, ["--strong_ops", "moco"]),
        ({"queue_size": 9}, ["--queue_size=9", "256"]),
        ({"flagfile": "no.flags"}, ["no.flags", "check the path"]),
        ({"flagfile": "{bad}"}, ["only flags", "'batch_size=3'"]),
        ({"dataset": "cifar10"}, ["first argument", "cifar10"]),
        ({"workdir": ""}, ["workdir", "''"]),
        ({"workdir": None}, ["workdir", "None"]),
        ({"outputs": "features"}, ["embedding", "'features'"]),
        ({"data": "/no/such/photos"}, ["/no/such/photos", "check the path"]),
        ({"data": pathlib.Path("photos")}, ["'photos'", "check the path"]),
        ({"data": PIXELS}, ["ndarray", "from_tensor_slices"]),
        (
            {
                "data": tf.data.Dataset.from_tensor_slices(PIXELS),
                "workdir": "a,b",
            },
            ["a,b", "without the characters"],
        ),
    ],
)
def test_wrong_settings_are_rejected(tmp_path, settings, words):
    (tmp_path / "bad.flags").write_text("batch_size=3\n")
    settings = {"data": "shapes", "workdir": tmp_path / "run", **settings}
    if settings.get("flagfile") == "{bad}":
        settings["flagfile"] = tmp_path / "bad.flags"
    with pytest.raises(UserError) as error:
        clsa_tf.pretrain(settings.pop("data"), **settings)
    for word in words:
        assert word in str(error.value), error.value
    assert not (tmp_path / "run").exists()


# ---- Runs


def interrupt_when(condition):
    """Sends SIGINT, as Ctrl-C does, from another thread."""

    def wait():
        while not condition():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
def test_pretrain_equals_the_command_despite_other_global_settings(
    photos, finished, tmp_path, capfd
):
    """The run is interrupted and resumed, under another policy and seed."""
    workdir = tmp_path / "run"
    runs.leave_out_pictures(workdir)
    settings = SETTINGS | {"workdir": workdir, "checkpoint_steps": 1}
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        keras.utils.set_random_seed(7)
        interrupt_when(lambda: runs.saved(workdir, 2))
        with pytest.raises(KeyboardInterrupt):
            clsa_tf.pretrain(photos, **settings)
        assert not runs.saved(workdir, 9)
        encoder = clsa_tf.pretrain(photos, **settings)
        assert keras.mixed_precision.global_policy().name == "mixed_bfloat16"
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert "resuming" in capfd.readouterr().out
    assert handlers == [
        signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)
    ]
    command = (finished[0] / "run.flags").read_text()
    assert (workdir / "run.flags").read_text() == command.replace(
        str(finished[0]), str(workdir)
    )
    runs.assert_equal_states(runs.states(workdir), runs.states(finished[0]))
    assert runs.lines(workdir) == runs.lines(finished[0])
    # It returns that run's encoder, made of Keras' layers.
    assert type(encoder).__name__ == "Functional" and encoder.trainable
    assert_equal_weights(encoder, clsa_tf.load_encoder(finished[0]))


@pytest.mark.slow
def test_pretrain_works_outside_the_main_thread(tmp_path):
    for i, image in enumerate(noise(40)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    found = []

    def train():
        settings = SETTINGS | {"total_epochs": 1}
        runs.leave_out_pictures(tmp_path / "run")
        found.append(
            clsa_tf.pretrain(tmp_path, workdir=tmp_path / "run", **settings)
        )

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert_equal_weights(found[0], clsa_tf.load_encoder(tmp_path / "run"))
    initial = found[0].predict(noise(4), verbose=0)
    model = keras.Sequential([found[0], keras.layers.Dense(2)])
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    model.fit(noise(4), np.eye(4, 2), verbose=0)  # it can be fine-tuned
    assert np.abs(found[0].predict(noise(4), verbose=0) - initial).max() > 1e-3


# ---- tf.data.Dataset


class Counted:
    """A dataset from a generator, which counts how often it is read."""

    def __init__(self, images, labels):
        self.times = 0

        def examples():
            self.times += 1
            yield from zip(images, labels)

        self.dataset = tf.data.Dataset.from_generator(
            examples,
            output_signature=(
                tf.TensorSpec([None, None, 3], images.dtype),
                tf.TensorSpec([], tf.int32),
            ),
        )


@pytest.mark.slow
def test_a_dataset_is_read_only_once(tmp_path, capfd):
    counted = Counted(np.float32(PIXELS) / 255, np.arange(40) % 3)
    settings = SETTINGS | {"total_epochs": 1, "workdir": tmp_path / "run"}
    # The classes differ from those of the training images.
    settings["eval_dataset"] = of((PIXELS[:30], np.arange(30) % 2))
    runs.leave_out_pictures(tmp_path / "run")
    encoder = clsa_tf.pretrain(counted.dataset, **settings)
    printed = capfd.readouterr().out
    assert f"writing the dataset to {tmp_path}/run/dataset with" in printed
    assert f"writing the dataset to {tmp_path}/run/eval_dataset" in printed
    assert (
        "of 30 images" in printed and "each compared with all others" in printed
    )
    assert any("knn" in entry for entry in runs.lines(tmp_path / "run"))
    again = clsa_tf.pretrain(counted.dataset, outputs="both", **settings)
    printed = capfd.readouterr().out
    assert "written before and is not read again" in printed
    assert counted.times == 1 and "is complete" in printed
    assert set(again.output) == {"embedding", "projection"}
    np.testing.assert_array_equal(
        encoder(PIXELS[:4]), again(PIXELS[:4])["embedding"]
    )
    assert_equal_weights(encoder, clsa_tf.load_encoder(tmp_path / "run"))


def read(directory):
    """Images and labels as training reads them."""
    source = open_source(f"tfrecord:{dataset_writer.pattern(directory)}")
    examples = source.examples(start=0, seed=0, shuffle=False, repeat=False)
    examples = list(examples.as_numpy_iterator())
    images = [decode(e["bytes"]).numpy() for e in examples]
    return images, [int(e["label"]) for e in examples]


LABELS = np.arange(40) % 7
KINDS = {
    "uint8": PIXELS,
    "float32": np.clip(np.float32(PIXELS) - 0.4, 0, 255) / np.float32(255),
    "float64": np.clip(PIXELS + 0.4, 0, 255) / 255,
    "one": (PIXELS,),
    "pair": (PIXELS, LABELS),
    "vector": (np.float32(PIXELS) / 255, np.uint8(LABELS)[:, np.newaxis]),
    "one-hot": (PIXELS, np.eye(7)[LABELS]),
    "dictionary": {"image": PIXELS, "label": LABELS, "id": LABELS},
    "encoded": ([encode(x) for x in PIXELS], LABELS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_written_datasets_keep_images_and_labels(tmp_path, kind):
    dataset = tf.data.Dataset.from_tensor_slices(KINDS[kind])
    dataset_writer.write(dataset, tmp_path / "dataset", shard_bytes=20_000)
    assert len(list(tmp_path.glob("dataset/*.tfrecord"))) > 2
    images, labels = read(tmp_path / "dataset")
    np.testing.assert_array_equal(images, PIXELS)
    labelled = kind in ("pair", "vector", "dictionary", "encoded")
    assert labels == (LABELS.tolist() if labelled else [-1] * 40)


def test_images_of_any_size_and_grey_images_are_kept(tmp_path):
    sizes = [(8, 9), (30, 7), (1, 1)]
    arrays = [noise(1, size=30)[0, :h, :w, :1] for h, w in sizes]
    dataset = tf.data.Dataset.from_generator(
        lambda: arrays, output_signature=tf.TensorSpec(None, tf.uint8)
    )
    dataset_writer.write(dataset, tmp_path / "dataset")
    for image, array in zip(read(tmp_path / "dataset")[0], arrays):
        np.testing.assert_array_equal(image, np.tile(array, [1, 1, 3]))


def of(x):
    return tf.data.Dataset.from_tensor_slices(x)


def failing():
    yield PIXELS[0]
    raise RuntimeError("the camera is gone")


WRONG = {
    "infinite": (of(PIXELS).repeat(), ["finite", "repeat()"]),
    "batched": (of(PIXELS).batch(4), ["batches", "uint8 (None, 24", "unbatch"]),
    "batched strings": (of([["a", "b"]]), ["batches", "string (2,)"]),
    "int32": (of(np.int32(PIXELS)), ["uint8 or float", "int32 (24, 24, 3)"]),
    "four channels": (of(noise(2).repeat(2, -1)[..., :4]), ["(32, 32, 4)"]),
    "no images": (of(LABELS), ["images", "int64 ()"]),
    "0..255": (of(np.float32(PIXELS)), ["[0, 1]", "255 in image 0", "uint8"]),
    "negative": (of(PIXELS / 255 - 0.1), ["[0, 1]", "from -0.1"]),
    "nan": (of(PIXELS * np.float32("nan")), ["[0, 1]", "nan in image 0"]),
    "names": (of(["/a/b.JPG", "/a/c.webp"]), ["'/a/b.JPG'", "tf.io.read_file"]),
    "empty": (of(PIXELS).take(0), ["empty"]),
    "all left out": (of(PIXELS).filter(lambda _: False), ["empty"]),
    "triple": (of((PIXELS, LABELS, LABELS)), ["(image, label)", "map()"]),
    "no image": (of({"pixels": PIXELS}), ['"image"', "pixels"]),
    "ragged": (of({"image": tf.ragged.constant([[1], []])}), ["Ragged"]),
    "unknown rank": (
        tf.data.Dataset.from_generator(
            lambda: [PIXELS], output_signature=tf.TensorSpec(None, tf.uint8)
        ),
        ["Cannot read", "after 0 images", "[40,24,24,3]"],
    ),
    "failing": (
        tf.data.Dataset.from_generator(
            failing, output_signature=tf.TensorSpec([24, 24, 3], tf.uint8)
        ),
        ["Cannot read", "after 1 images", "the camera is gone"],
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_datasets_are_rejected(tmp_path, kind):
    dataset, words = WRONG[kind]
    with pytest.raises(UserError) as error:
        dataset_writer.write(dataset, tmp_path / "dataset")
    message = str(error.value)
    if not message.startswith("Cannot read the tf.data.Dataset "):
        assert message.startswith("Expected") and "received" in message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.lock"]


def test_another_dataset_for_the_same_workdir_is_rejected(tmp_path):
    dataset_writer.write(of(PIXELS), tmp_path / "dataset")
    with pytest.raises(UserError, match="of 40 images .* received one of 39"):
        dataset_writer.write(of(PIXELS[1:]), tmp_path / "dataset")
    (tmp_path / "dataset" / "about.json").unlink()
    with pytest.raises(UserError, match="remove it or choose"):
        dataset_writer.write(of(PIXELS), tmp_path / "dataset")


def test_an_interrupted_write_leaves_no_files(tmp_path):
    def examples():
        for i, image in enumerate(PIXELS):
            if i == 30:
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(1)
            yield image

    dataset = tf.data.Dataset.from_generator(
        examples, output_signature=tf.TensorSpec([24, 24, 3], tf.uint8)
    )
    # Shells start background processes with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            dataset_writer.write(
                dataset, tmp_path / "dataset", shard_bytes=9000
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.lock"]
    # Files of a killed process do not prevent the next write.
    (tmp_path / "dataset.unfinished").mkdir()
    (tmp_path / "dataset.unfinished" / "images-00099.tfrecord").touch()
    dataset_writer.write(of(PIXELS), tmp_path / "dataset")
    np.testing.assert_array_equal(read(tmp_path / "dataset")[0], PIXELS)


def test_write_errors_are_user_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write the dataset"):
        dataset_writer.write(of(PIXELS), tmp_path / "file" / "dataset")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(UserError, match="/dataset: .*make room"):
            dataset_writer.write(of(PIXELS), tmp_path / "dataset")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("dataset*/*"))


# ---- Lists and imports


def test_methods_are_listed():
    printed = runs.call(runs.command("clsa_tf.train", "--list_methods")).stdout
    assert max(map(len, printed.splitlines())) <= 80
    lines = re.split(r"\n(?=\w)", printed)
    assert [line.split()[0] for line in lines] == list(methods.names())
    (starts,) = {len(line) - len(line.split(None, 1)[1]) for line in lines}
    assert starts == 2 + max(map(len, methods.names()))
    (clsa,) = (line for line in lines if line.startswith("clsa "))
    assert "contrastive learning with stronger augmentations" in clsa
    assert "quickstart" in clsa


def test_methods_are_listed_with_their_recipes():
    described = list_methods.describe()
    assert "  --flagfile= moco_v1, moco_v2, cifar10/moco\n" in described
    for name in flagfiles.recipes():
        if name != "cifar10/common":  # of no method
            assert re.search(rf"[= ]{name}(,|$)", described, re.M), name


def test_import_does_not_import_tensorflow():
    code = (
        "import clsa_tf, sys; assert 'tensorflow' not in sys.modules; "
        "assert {'pretrain', 'load_encoder'} <= set(dir(clsa_tf))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
