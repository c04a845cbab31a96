import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras

import clsa_tf
from clsa_tf import config as config_lib
from clsa_tf.api import load
from clsa_tf.errors import UserError
from clsa_tf.networks import functional
from clsa_tf.networks.encoder import make_encoder
from export import formats
from tests import exports
from tests.marks import slow_but

PIXELS = exports.noise(4)
# The package that contains Keras 2.
KERAS = keras.Model.__module__.split(".")[0]

# In a process that cannot import clsa_tf: loads, and predicts.
CLEAN = """
import sys
import numpy as np
from tensorflow import keras
sys.modules["clsa_tf"] = None  # importing it is an error
model = keras.models.load_model(sys.argv[1])
images = np.load(sys.argv[2])
np.save(sys.argv[3], model.predict(images, verbose=0))
"""


@pytest.fixture(scope="module")
def keras_file(exported, tmp_path_factory):
    output = tmp_path_factory.mktemp("formats")
    formats.export(str(exported.workdir), str(output), formats=["keras"])
    return output / "encoder.keras"


@pytest.fixture
def encoder(exported):
    return clsa_tf.load_encoder(exported.path)


def assert_close(found, expected, tolerance=1e-4):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("place", ["run", "version", "versions", "file", "dir"])
def test_loaded_encoders_equal_the_trained_one(exported, keras_file, place):
    path = {
        "run": exported.workdir,
        "version": exported.path,
        "versions": exported.base,
        "file": keras_file,
        "dir": keras_file.parent,
    }[place]
    encoder = clsa_tf.load_encoder(path)
    assert type(encoder).__name__ == "Functional"
    packages = {type(x).__module__.split(".")[0] for x in encoder.layers}
    assert packages == {KERAS}
    assert_close(encoder(PIXELS), exported.encoder(PIXELS))
    # Images of another size than in training, and not square.
    large = np.tile(PIXELS, [1, 2, 3, 1])
    assert_close(encoder(large), exported.encoder(large))


def test_outputs_are_embedding_projection_or_both(exported):
    both = clsa_tf.load_encoder(exported.path, outputs="both")(PIXELS)
    assert_close(both["embedding"], exported.encoder(PIXELS))
    assert_close(both["projection"], exported.encoder.project(PIXELS))
    one = clsa_tf.load_encoder(exported.path, outputs="projection")(PIXELS)
    assert_close(one, both["projection"])


@pytest.mark.slow
@pytest.mark.parametrize("place", slow_but(1, ["file", "run"]))
def test_the_range_of_pixels_can_be_chosen(
    exported, keras_file, place, tmp_path
):
    path = exported.workdir if place == "run" else keras_file
    expected = exported.encoder(PIXELS)
    default = clsa_tf.load_encoder(path)
    assert_close(default(np.float32(PIXELS)), expected)
    unit = clsa_tf.load_encoder(path, pixels=(0, 1))
    assert_close(unit(np.float32(PIXELS / 255)), expected)
    signed = clsa_tf.load_encoder(path, pixels=(-1, 1))
    assert_close(signed(np.float32(PIXELS / 127.5 - 1)), expected, 1e-3)
    assert [x.input_names for x in (default, unit, signed)] == [
        ["images_0_255"],
        ["images_0_1"],
        ["images_-1_1"],
    ]
    # The model can be saved with any name of the input.
    signed.save(tmp_path / "it.keras")
    again = keras.models.load_model(tmp_path / "it.keras", compile=False)
    assert_close(again(PIXELS), signed(PIXELS))


def test_a_file_accepts_the_same_pixels_in_plain_keras(exported, keras_file):
    expected = exported.encoder(PIXELS)
    plain = keras.models.load_model(keras_file, compile=False)
    assert plain.input_names == ["images_0_255"]
    assert_close(plain(PIXELS)["embedding"], expected)
    ours = clsa_tf.load_encoder(keras_file)
    assert ours.input_names == ["images_0_255"]
    assert_close(ours(PIXELS), expected)


def test_a_file_of_an_earlier_version_can_be_loaded(
    exported, keras_file, tmp_path
):
    """Its input is called `images`, with values in 0..1."""
    old = functional.with_input(
        keras.models.load_model(keras_file, compile=False), "images"
    )
    normalise = old.get_layer("normalise")
    normalise.scale, normalise.offset = functional.affine((0, 1))
    old.save(tmp_path / "encoder.keras")
    plain = keras.models.load_model(tmp_path / "encoder.keras", compile=False)
    expected = exported.encoder(PIXELS)
    unit = np.float32(PIXELS / 255)
    assert_close(plain(unit)["embedding"], expected)
    ours = clsa_tf.load_encoder(tmp_path)
    assert ours.input_names == ["images_0_255"]
    assert_close(ours(PIXELS), expected)
    ours = clsa_tf.load_encoder(tmp_path, pixels=(0, 1))
    assert ours.input_names == ["images_0_1"]
    assert_close(ours(unit), expected)


def test_the_documented_check_detects_a_wrong_range(encoder):
    normalise = encoder.get_layer("normalise")
    assert 0.5 < np.std(normalise(PIXELS)) < 2
    assert np.std(normalise(np.float32(PIXELS / 255))) < 0.5
    assert np.std(normalise(255.0 * PIXELS)) > 100


@pytest.mark.slow
def test_every_weight_and_statistic_is_trained(encoder):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([encoder, keras.layers.Dense(2)])
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(np.float32(PIXELS), training=True) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert len(gradients) == len(encoder.trainable_variables) + 2 > 50
    for gradient, variable in zip(gradients, model.trainable_variables):
        assert np.abs(gradient).max() > 0, variable.name

    before = [v.numpy() for v in encoder.variables]
    # Adam's steps do not shrink with the gradients.
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(PIXELS, np.arange(4) % 2, verbose=0)
    names = [v.name for v in encoder.variables]
    assert sum("moving_" in name for name in names) == 40
    for name, old, new in zip(names, before, encoder.variables):
        assert np.any(old != new.numpy()), name


def test_a_frozen_encoder_does_not_change(exported):
    encoder = clsa_tf.load_encoder(exported.path, trainable=False)
    assert encoder.trainable_variables == []
    before = encoder(PIXELS).numpy()
    model = keras.Sequential([encoder, keras.layers.Dense(2)])
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(PIXELS, np.arange(4) % 2, verbose=0)
    np.testing.assert_array_equal(encoder(PIXELS), before)


@pytest.mark.slow
def test_models_built_on_an_encoder_do_not_need_this_library(encoder, tmp_path):
    model = keras.Sequential([encoder, keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    model.fit(PIXELS, np.zeros([4, 3]), verbose=0)
    paths = [tmp_path / name for name in ("m.keras", "in.npy", "out.npy")]
    model.save(paths[0])
    np.save(paths[1], PIXELS)
    subprocess.run([sys.executable, "-I", "-c", CLEAN, *paths], check=True)
    assert_close(np.load(paths[2]), model(PIXELS))


@pytest.mark.parametrize(
    "backbone, stem, strides",
    slow_but(
        1,
        [
            ("resnet18", "small", [1, 2, 4, 8]),
            ("resnet34", "imagenet", [4, 8, 16, 32]),
            ("resnet50", "imagenet", [4, 8, 16, 32]),
        ],
    ),
)
def test_every_architecture_is_equal_and_has_its_stages(
    backbone, stem, strides
):
    config = config_lib.default(
        "moco",
        backbone=backbone,
        stem=stem,
        width=0.125,
        projection_size=8,
        batch_norm="split",
        batch_norm_splits=2,
    )
    original = make_encoder(config, name="encoder")
    rng = np.random.default_rng(0)
    for variable in original.variables:  # statistics, too
        variable.assign(rng.uniform(0.5, 1.5, variable.shape) * variable + 0.01)
    model = functional.from_encoder(original, config)
    images = exports.noise(2, size=64)
    found = model(np.float32(images))
    assert_close(found["embedding"], original(images))
    assert_close(found["projection"], original.project(images))
    maps = [model.get_layer(name).output for name in load.stages(model)]
    shapes = [x.shape[1] for x in keras.Model(model.input, maps)(images)]
    assert shapes == [64 // stride for stride in strides]


def test_the_newest_version_by_number_is_loaded(exported, tmp_path):
    for version in ("9", "10"):
        shutil.copytree(exported.path, tmp_path / version)
    shutil.rmtree(tmp_path / "9" / "variables")
    (tmp_path / "11").mkdir()  # still empty
    encoder = clsa_tf.load_encoder(tmp_path)
    assert_close(encoder(PIXELS), exported.encoder(PIXELS))


def damaged_export(exported, path):
    shutil.copytree(exported.path, path)
    (path / "variables" / "variables.data-00000-of-00001").write_bytes(b"")


def export_of_another_size(exported, path):
    shutil.copytree(exported.path, path)
    card = (path / "model_card.json").read_text()
    text = card.replace('"width": 0.125', '"width": 0.25')
    assert text != card
    (path / "model_card.json").write_text(text)


def export_without_card(exported, path):
    shutil.copytree(exported.path, path)
    (path / "model_card.json").unlink()


def export_of_unknown_architecture(exported, path):
    shutil.copytree(exported.path, path)
    card = (path / "model_card.json").read_text()
    (path / "model_card.json").write_text(card.replace("resnet18", "vit"))


def damaged_keras_file(exported, path):
    keras.Sequential([keras.Input([3])]).save(path)
    path.write_bytes(path.read_bytes()[:-100])


def renamed_keras_file(exported, path):
    keras.Sequential([keras.Input([3])]).save(path.with_suffix(".keras"))
    path.with_suffix(".keras").rename(path)


def foreign_keras_file(exported, path):
    keras.Sequential([keras.Input([3]), keras.layers.Dense(1)]).save(path)


def empty_directory(exported, path):
    path.mkdir()


def nothing(exported, path):
    pass


@pytest.mark.parametrize(
    "make, name, message",
    [
        (damaged_export, "it", "variables"),
        (export_of_another_size, "it", "hape"),
        (export_without_card, "it", "model_card.json"),
        (export_of_unknown_architecture, "it", "vit"),
        (damaged_keras_file, "it.keras", "not a .keras file"),
        (renamed_keras_file, "it.h5", "not a .keras file"),
        (foreign_keras_file, "it.keras", "normalise"),
        (empty_directory, "it", "none of them"),
        (nothing, "it", "does not exist"),
    ],
)
def test_invalid_places_are_rejected(exported, tmp_path, make, name, message):
    path = tmp_path / name
    make(exported, path)
    with pytest.raises(UserError, match=message) as error:
        clsa_tf.load_encoder(path)
    text = str(error.value)
    assert text.startswith("Expected ") and str(path) in text
    assert len(text.splitlines()) == 1


def test_a_damaged_file_names_the_version_that_wrote_it(keras_file, tmp_path):
    shutil.copytree(keras_file.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "encoder.keras").write_bytes(keras_file.read_bytes()[:-100])
    with pytest.raises(UserError) as error:
        clsa_tf.load_encoder(tmp_path)
    assert f"written by clsa_tf {clsa_tf.__version__};" in str(error.value)


@pytest.mark.parametrize("wrong", [{"outputs": "head"}, {"pixels": (1, 1)}])
def test_wrong_arguments_are_rejected(exported, wrong):
    with pytest.raises(UserError, match="^Expected"):
        clsa_tf.load_encoder(exported.path, **wrong)


def test_import_does_not_import_keras():
    code = (
        "import sys, clsa_tf; assert not {'tensorflow', 'keras', 'numpy'} & "
        "{*sys.modules}; clsa_tf.load_encoder; "
        f"assert {KERAS!r} in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no_such_thing"):
        clsa_tf.no_such_thing  # noqa: B018
