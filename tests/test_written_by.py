"""Errors about runs and exports name the version that wrote them."""

import functools
import json
from unittest import mock

import pytest
import tensorflow as tf

import clsa_tf
from clsa_tf import config as config_lib
from clsa_tf.errors import UserError
from clsa_tf.training import run as run_lib
from clsa_tf.training import workdir
from clsa_tf.training.checkpoint import Checkpoints, load_trained
from export.deployment import exported_versions
from export.embedding import encoders
from export.model import warmup_requests
from export.serving.servable import open_version
from export.serving.serving_error import ServingError
from tests import tiny

PRESENT = clsa_tf.__version__
CARD = {"format": 9, "made_with": {"clsa_tf": "7.8.9", "python": "3.99"}}


def message(use, *arguments, **options):
    with pytest.raises((UserError, ServingError)) as error:
        use(*arguments, **options)
    return str(error.value)


def assert_names(text, *written):
    """Asserts that a message ends with these versions and the present one."""
    assert text.endswith(
        f" was written by clsa_tf {', then '.join(written)}; this is clsa_tf "
        f"{PRESENT}."
    ), text


@pytest.fixture
def config(tmp_path):
    # A backbone that flags know.
    return tiny.config(backbone="resnet18", workdir=str(tmp_path))


@pytest.fixture
def begun(config, tmp_path):
    """A run that another version began."""
    with workdir.claim(config, images=64):
        pass
    path = tmp_path / "run.flags"
    path.write_text(path.read_text().replace(PRESENT, "7.8.9", 1))
    return tmp_path


def unreadable_checkpoint(directory):
    folder = directory / "checkpoints"
    folder.mkdir()
    (folder / "step-4.index").write_bytes(b"of another format")
    (folder / "step-4.data-00000-of-00001").touch()
    return folder


# ---- Runs


def test_contradicting_flags(begun):
    path = begun / "run.flags"
    text = path.read_text()
    path.write_text(
        text.replace("=local\n", "=split\n").replace("_splits=8\n", "_splits=3")
    )
    assert path.read_text() != text
    found = message(config_lib.load, str(begun))
    assert "--batch_norm_splits" in found and "run.flags" in found
    assert_names(found, "7.8.9")
    path.write_text(path.read_text().split("\n", 1)[1])
    assert_names(message(config_lib.load, str(begun)), "0.1.0 or earlier")


def test_unreadable_checkpoints(config, begun):
    unreadable_checkpoint(begun)
    assert_names(message(load_trained, str(begun)), "7.8.9")
    checkpoints = Checkpoints(tiny.make(tiny.config()), str(begun), keep=1)
    # A start writes the flags before it reads the checkpoint.
    for _ in range(2):
        with workdir.claim(config, images=64, newest_step=lambda: 4):
            assert_names(message(checkpoints.restore), "7.8.9", PRESENT)
    assert config_lib.load(str(begun)) == config


def test_missing_checkpoints(begun):
    (unreadable_checkpoint(begun) / "step-4.index").unlink()
    found = message(load_trained, str(begun))
    assert "without its index" in found
    assert_names(found, "7.8.9")


def test_an_unreadable_newest_checkpoint(config, begun):
    shortened = mock.Mock(
        _config=config.replace(total_epochs=2),
        _claim=mock.Mock(shorter=True),
        _steps_per_epoch=4,
    )
    found = message(run_lib._Run._check_still_complete, shortened, 7)
    assert "8 steps" in found and "received 7" in found
    assert_names(found, "7.8.9")


def test_an_invalid_record_of_the_dataset(config, begun):
    (begun / "dataset.json").write_text('{"pictures": 64}')
    assert_names(message(workdir.claim, config, images=64), "7.8.9")


def test_run_flags_list_all_versions(config, begun):
    path = begun / "run.flags"
    lines = path.read_text().split("\n")[1:]
    for before, after in (
        ([], [PRESENT, "0.1.0 or earlier"]),
        (["0.3.0", "0.2.5"], [PRESENT, "0.3.0", "0.2.5"]),
        (["0.3.0", PRESENT, "0.2.5"], [PRESENT, "0.3.0", "0.2.5"]),
        ([PRESENT], [PRESENT]),
    ):
        path.write_text("\n".join([f"# clsa_tf {x}" for x in before] + lines))
        for step in (0, 4):
            newest = functools.partial(int, step)
            with workdir.claim(config, images=64, newest_step=newest):
                found = path.read_text().split("\n")
        assert found == [f"# clsa_tf {x}" for x in after] + lines


# ---- Exports


def embed_encoder(path):
    return encoders.SavedModelEncoder(path, ["embedding"])


def deployed(path):
    folder, _, version = path.rpartition("/")
    return exported_versions.read(folder, int(version))


@pytest.mark.parametrize(
    "use",
    [clsa_tf.load_encoder, embed_encoder, open_version, deployed],
    ids=lambda use: use.__name__,
)
def test_unreadable_exports(use, tmp_path):
    version = tmp_path / "3"
    (version / "variables").mkdir(parents=True)
    (version / "variables" / "variables.index").touch()
    (version / "saved_model.pb").write_bytes(b"of another format")
    (version / "model_card.json").write_text(json.dumps(CARD))
    assert_names(message(use, str(version)), "7.8.9")
    # Models of other programs have no such record.
    (version / "model_card.json").write_text('{"made_with": "love"}')
    assert PRESENT not in message(use, str(version))
    (version / "model_card.json").unlink()
    assert PRESENT not in message(use, str(version))


def test_unreadable_limits_and_warm_up_requests(tmp_path):
    (tmp_path / "model_card.json").write_text(json.dumps(CARD))
    (tmp_path / "assets.extra").mkdir()
    (tmp_path / warmup_requests.PATH).write_bytes(b"of another format")
    model = exported_versions.ExportedVersion(str(tmp_path), True)
    assert_names(message(exported_versions.max_images, model), "7.8.9")
    assert_names(message(exported_versions.warmup_images, model), "7.8.9")
    module = tf.Module()
    module.double = tf.function(
        lambda x: x * 2, input_signature=[tf.TensorSpec([None], tf.float32)]
    )
    tf.saved_model.save(module, str(tmp_path), signatures=module.double)
    found = message(open_version, str(tmp_path))
    assert "warm-up" in found
    assert_names(found, "7.8.9")


def test_unreadable_keras_files(tmp_path):
    (tmp_path / "encoder.keras").write_bytes(b"of another format")
    (tmp_path / "formats.json").write_text(json.dumps({"encoder.keras": CARD}))
    for path in (tmp_path, tmp_path / "encoder.keras"):
        assert_names(message(clsa_tf.load_encoder, path), "7.8.9")
    (tmp_path / "formats.json").unlink()
    assert PRESENT not in message(clsa_tf.load_encoder, tmp_path)
