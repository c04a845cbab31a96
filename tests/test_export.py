import io
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from clsa_tf import config as config_lib
from clsa_tf.checkpoint import Checkpoints
from clsa_tf.errors import UserError
from export import savedmodel
from tests import tiny


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny.config(
        "clsa",
        backbone="resnet18",  # one that flags know
        image_size=32,
        eval_keep=1.0,
        workdir=str(workdir),
    )
    method = tiny.make(config)
    # Moving statistics unlike the initial ones.
    tiny.fit(method, tiny.batches(config, 2))
    Checkpoints(method, str(workdir), keep=1).save()
    (workdir / "run.flags").write_text(config_lib.to_flagfile(config))
    output = workdir / "export"
    path = savedmodel.export(str(workdir), str(output))
    return method.encoder, workdir, output, path


def encode(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_version_directory_is_complete_and_nothing_else_is_left(exported):
    _, workdir, output, path = exported
    assert path == f"{output}/1" and os.listdir(output) == ["1"]
    assert {"saved_model.pb", "variables"} <= set(os.listdir(path))


def test_signatures_equal_the_encoder(exported):
    encoder, _, _, path = exported
    signatures = tf.saved_model.load(path).signatures
    pixels = np.random.default_rng(0).integers(0, 256, [2, 32, 32, 3], np.uint8)
    expected = encoder(pixels), encoder.project(pixels)
    from_floats = signatures["images"](tf.constant(np.float32(pixels / 255)))
    encoded = [encode(Image.fromarray(p), "PNG") for p in pixels]
    from_bytes = signatures["serving_default"](tf.constant(encoded))
    for outputs in (from_floats, from_bytes):
        assert set(outputs) == {"embedding", "projection"}
        for got, want in zip(
            (outputs["embedding"], outputs["projection"]), expected
        ):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
    lengths = tf.norm(from_bytes["projection"], axis=1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)


def test_all_formats_and_sizes(exported):
    serve = tf.saved_model.load(exported[3]).signatures["serving_default"]
    photo = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, [40, 90, 3], np.uint8)
    )
    files = [
        encode(photo, "PNG"),
        encode(photo, "BMP"),
        encode(photo.convert("L"), "JPEG"),
        encode(photo.convert("P"), "GIF"),
        encode(photo.convert("RGBA").resize((7, 5)), "PNG"),
    ]
    embeddings = serve(tf.constant(files))["embedding"].numpy()
    assert np.isfinite(embeddings).all()
    np.testing.assert_allclose(embeddings[0], embeddings[1], rtol=1e-4)
    assert np.abs(embeddings[0] - embeddings[4]).max() > 1e-3
    with pytest.raises(tf.errors.InvalidArgumentError):
        serve(tf.constant([b"not an image"]))


def test_versions_count_up_and_are_never_overwritten(exported):
    _, workdir, output, _ = exported
    path = savedmodel.export(str(workdir), str(output), version=7)
    assert path.endswith("/7")
    with pytest.raises(UserError, match="does not exist yet"):
        savedmodel.export(str(workdir), str(output), version=7)
    assert savedmodel.export(str(workdir), str(output)).endswith("/8")


def test_a_model_that_computes_something_else_is_not_published(
    exported, tmp_path, monkeypatch
):
    _, workdir, _, _ = exported
    save = savedmodel._save

    def save_another(module, path):
        weight = module._encoder.trainable_variables[0]
        weight.assign_add(0.5 * tf.ones_like(weight))
        save(module, path)
        weight.assign_sub(0.5 * tf.ones_like(weight))

    monkeypatch.setattr(savedmodel, "_save", save_another)
    with pytest.raises(UserError, match="nothing was published"):
        savedmodel.export(str(workdir), str(tmp_path / "export"))
    assert os.listdir(tmp_path / "export") == []


def test_a_directory_without_a_run_is_explained(tmp_path):
    with pytest.raises(UserError, match="directory of a run"):
        savedmodel.export(str(tmp_path), str(tmp_path / "out"))
