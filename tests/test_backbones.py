"""The registry of backbones, and the backbones of two libraries."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras

import clsa_tf
from clsa_tf import config as config_lib
from clsa_tf import train
from clsa_tf.errors import UserError
from clsa_tf.networks import backbones, functional
from clsa_tf.networks.backbones import libraries
from clsa_tf.networks.encoder import make_encoder
from export import savedmodel
from tests import exports, runs, tiny
from tests.marks import slow_but

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


def test_a_function_in_the_registry_is_a_backbone(monkeypatch):
    def flat(*, width, stem, bn_kind, bn_splits, seed, precision):
        del width, stem, bn_kind, bn_splits, seed, precision
        images = keras.Input([None, None, 3])
        return keras.Model(
            images, keras.layers.GlobalAveragePooling2D()(images)
        )

    monkeypatch.setitem(backbones.BACKBONES, "flat", flat)
    assert config_lib.parse(["--backbone=flat"]).backbone == "flat"
    _, encoder = encoder_of("flat")
    assert encoder(tf.zeros([2, 8, 8, 3], tf.uint8)).shape == [2, 3]


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
    assert libraries.build("keras_cv:Nested").output_shape == (None, 3)
    with pytest.raises(UserError, match="--batch_norm=local"):
        libraries.build("keras_cv:Nested", bn_kind="split", bn_splits=2)
