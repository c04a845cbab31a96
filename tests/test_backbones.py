"""The registry of backbones, and the backbones of two libraries."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras

import clsa_tf
from clsa_tf import config as config_lib
from clsa_tf import config_fields, train
from clsa_tf.api import load
from clsa_tf.errors import UserError
from clsa_tf.networks import backbones, functional
from clsa_tf.networks.backbones import libraries
from clsa_tf.networks.encoder import make_encoder, weight_name
from clsa_tf.training import initial_weights
from export import formats, savedmodel
from tests import exports, runs, tiny
from tests.marks import slow_but
from tests.modules import copied

# One backbone of each library, from keras.applications the smallest.
LIBRARIES = ("keras_applications:MobileNetV2", "keras_cv:ResNet18V2")


def encoder_of(backbone, **changes):
    config = tiny.config(
        backbone=backbone, width=1.0, stem="imagenet", **changes
    )
    return config, make_encoder(config, name="encoder")


def test_wrong_names_are_rejected_with_a_suggestion():
    for name in ("resnet18", "resnet50", *LIBRARIES, "keras_cv:DenseNet121"):
        assert backbones.problem(name) == ""
    for name, near in (
        ("resnet19", "resnet18"),
        ("keras_applications:MobilNetV2", "MobileNetV2"),
        ("keras_cv:Densenet121", "DenseNet121"),
        ("torchvision:resnet18", "keras_applications"),
    ):
        for word in (near, repr(name.split(":")[-1])[:-1].split("'")[-1]):
            assert word in backbones.problem(name)
        with pytest.raises(UserError, match="--backbone"):
            config_lib.parse([f"--backbone={name}"])


def test_library_backbones_reject_width_and_stem():
    with pytest.raises(UserError, match="--width"):
        backbones.build(LIBRARIES[0], width=0.5)
    with pytest.raises(UserError, match="small"):
        backbones.build(LIBRARIES[0], stem="small")


def test_sizes_that_a_backbone_cannot_encode_stop_the_run_at_its_start(
    monkeypatch, photos, tmp_path
):
    def made(_):
        images = keras.Input([None, None, 3])
        return keras.Model(images, keras.layers.Conv2D(2, 13)(images))

    monkeypatch.setattr(libraries, "_made", made)
    config = tiny.config(
        backbone=LIBRARIES[0],
        width=1.0,
        stem="imagenet",
        dataset=f"folder:{photos}",
        workdir=str(tmp_path / "run"),
        image_size=8,  # a negative size; strong views of 12 px give none
    )
    with pytest.raises(UserError, match=f"{LIBRARIES[0]} .* 8, 12 px;"):
        train.run(config)
    assert not (tmp_path / "run").exists()


def toy(*, width, stem, bn_kind, bn_splits, seed, precision):
    """A residual network with Keras' own layers, names and initial weights."""
    del stem, bn_kind, bn_splits, seed
    channels = int(8 * width)
    images = keras.Input([None, None, 3])
    x = keras.layers.Conv2D(channels, 3, 2, dtype=precision)(images)
    x = keras.layers.BatchNormalization(dtype=precision)(x)
    y = keras.layers.Conv2D(
        channels, 3, padding="same", activation="relu", dtype=precision
    )(x)
    x = keras.layers.Add(dtype=precision)([x, y])
    x = keras.layers.BatchNormalization(dtype=precision)(x)
    x = keras.layers.GlobalAveragePooling2D(dtype=precision)(x)
    return keras.Model(images, x)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(backbones.BACKBONES, "toy", toy)


def change(encoder):
    """Gives every variable, such as statistics, another value."""
    rng = np.random.default_rng(0)
    for variable in encoder.variables:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape) * variable + 0.1)


def test_a_function_in_the_registry_is_a_backbone(registered):
    assert config_lib.parse(["--backbone=toy"]).backbone == "toy"
    config, encoder = encoder_of("toy")
    change(encoder)
    images = exports.noise(2, 17)
    model = functional.from_encoder(encoder, config)
    outputs = model(np.float32(images))
    np.testing.assert_allclose(
        outputs["embedding"], encoder(images), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        outputs["projection"], encoder.project(images), atol=1e-5
    )
    # As one layer, with names that do not depend on earlier layers.
    names = [weight_name(v) for v in model.get_layer("backbone").variables]
    assert names == [f"backbone/{number:04d}" for number in range(12)]
    with pytest.raises(UserError, match="ResNet"):
        load.stages(model)
    unit = functional.with_input(model, "images_0_1")
    np.testing.assert_array_equal(
        unit(np.float32(images))["embedding"], outputs["embedding"]
    )


def test_a_function_in_the_registry_gets_every_setting(monkeypatch):
    calls = []
    monkeypatch.setitem(
        backbones.BACKBONES, "toy", lambda **x: calls.append(x) or toy(**x)
    )
    model = backbones.build("toy", width=2.0, precision="mixed_bfloat16")
    assert calls == [
        {
            "width": 2.0,
            "stem": "imagenet",
            "bn_kind": "local",
            "bn_splits": 1,
            "seed": 0,
            "precision": "mixed_bfloat16",
        }
    ]
    assert model.output.dtype == tf.float32
    assert model.output_shape == (None, 16)


@pytest.mark.parametrize(
    "make",
    [
        lambda **_: keras.Model(),
        lambda **_: keras.Sequential([keras.Input([None, None, 3])]),
    ],
)
def test_a_function_that_returns_no_features_is_said(make, monkeypatch):
    monkeypatch.setitem(backbones.BACKBONES, "toy", make)
    with pytest.raises(UserError, match="--backbone=toy"):
        backbones.build("toy")


def test_help_names_the_registry(registered):
    fields = copied(config_fields).Config.__dataclass_fields__
    words = fields["backbone"].metadata["help"]
    for name in (*backbones.BACKBONES, *libraries.LIBRARIES):
        assert name in words


@pytest.mark.slow
def test_a_backbone_of_the_registry_from_training_to_new_runs(
    registered, photos, tmp_path
):
    config = tiny.config(
        backbone="toy",
        width=1.0,
        stem="imagenet",
        dataset=f"folder:{photos}",
        holdout=0.0,
        workdir=str(tmp_path / "run"),
        total_epochs=1,
        knn_epochs=0,
        image_size=16,
    )
    encoder = train.run(config).encoder
    images = exports.noise(4, 16)
    expected = encoder(images).numpy()
    assert train.run(config).steps_taken == 3  # complete: read back
    exported = savedmodel.export(config.workdir, str(tmp_path / "export"))
    served = tf.saved_model.load(exported).signatures["images_uint8"]
    found = served(images=tf.constant(images))["embedding"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    files = tmp_path / "files"
    formats.export(config.workdir, str(files), formats=["keras", "weights"])
    for place, what in (
        (config.workdir, "encoder"),
        (config.workdir, "all"),
        (exported, "encoder"),
        (files, "encoder"),
    ):
        loaded = clsa_tf.load_encoder(place)
        np.testing.assert_allclose(loaded(images), expected, atol=1e-4)
        new = config.replace(
            workdir="/new", init_from=str(place), init_what=what, seed=1
        )
        method = tiny.make(new)
        initial_weights.read(new).give_to(method)
        np.testing.assert_array_equal(method.encoder(images), expected)
    unit = clsa_tf.load_encoder(files, pixels=(0, 1))(np.float32(images / 255))
    np.testing.assert_allclose(unit, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(1, LIBRARIES[::-1]))
def test_initial_weights_follow_the_seed(name):
    images = exports.noise(4, 64)
    keras.utils.set_random_seed(1)
    config, one = encoder_of(name, batch_norm="split", batch_norm_splits=2)
    keras.utils.set_random_seed(2)
    _, two = encoder_of(name, batch_norm="split", batch_norm_splits=2)
    _, other = encoder_of(name, seed=5)
    for mine, same, different in zip(
        one.trainable_variables,
        two.trainable_variables,
        other.trainable_variables,
    ):
        np.testing.assert_array_equal(mine, same)
        if len(mine.shape) > 1:
            assert np.any(mine != different), mine.name
    # There is no dropout, and parts of the batch have their own statistics.
    found = one(images, training=True).numpy()
    np.testing.assert_array_equal(found, one(images, training=True))
    np.testing.assert_allclose(
        found[:2], one(images[[0, 1, 0, 1]], training=True)[:2], atol=1e-5
    )
    # The functional model computes the same.
    model = functional.from_encoder(one, config)
    np.testing.assert_allclose(
        model(np.float32(images))["embedding"], one(images), atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_library_backbones_are_trained_exported_loaded_and_fine_tuned(
    name, photos, tmp_path
):
    workdir = tmp_path / "run"
    # The smallest crops that MobileNetV2 can encode.
    crops = ("key_crop", "query_crops", "strong_crops")
    arguments = runs.train(
        photos,
        workdir,
        f"--backbone={name}",
        "--width=1",
        "--total_epochs=1",
        *(f"--{crop}=32:0.3:1" for crop in crops),
    )
    runs.call(arguments)
    config = config_lib.load(str(workdir))
    assert train.run(config).steps_taken == 3  # it was complete
    path = savedmodel.export(str(workdir), str(tmp_path / "export"))
    images = exports.noise(4, 32)
    served = tf.saved_model.load(path).signatures["images_uint8"]
    expected = served(images=tf.constant(images))["embedding"]
    for place in (workdir, path):
        encoder = clsa_tf.load_encoder(place)
        np.testing.assert_allclose(encoder(images), expected, atol=1e-4)
    model = keras.Sequential([encoder, keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    model.fit(np.float32(images), np.array([0, 1, 0, 1]), verbose=0)
    saved = tmp_path / "model.keras"
    model.save(saved)
    again = keras.models.load_model(saved)
    np.testing.assert_allclose(again(images), model(images), atol=1e-4)


def test_split_batch_norm_rejects_layers_that_cannot_be_replaced(
    monkeypatch,
):
    class Block(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.norm = keras.layers.BatchNormalization()

        def call(self, x):
            return self.norm(x)

    def made(_):
        images = keras.Input([None, None, 3])
        return keras.Model(images, Block()(images))

    monkeypatch.setattr(libraries, "_made", made)
    assert backbones.build("keras_cv:Nested").output_shape == (None, 3)
    with pytest.raises(UserError, match="--batch_norm=local"):
        backbones.build("keras_cv:Nested", bn_kind="split", bn_splits=2)


def test_layers_whose_build_is_unknown_have_weights_from_the_seed(monkeypatch):
    class Mix(keras.layers.Layer):
        def build(self, shape):
            self.dense = keras.layers.Dense(3)
            self.dense.build(shape)  # which does not record the shape

        def call(self, x):
            return self.dense(x)

    def made(_):
        images = keras.Input([None, None, 3])
        return keras.Model(images, Mix()(images))

    monkeypatch.setattr(libraries, "_made", made)
    one, same, other = (
        backbones.build("keras_cv:Mix", seed=seed).get_weights()[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)
