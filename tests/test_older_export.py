"""An export of version 0.1.0 can be loaded, served and deployed.

`tests/data/export_0.1.0.zip` holds the export of `tests/data/workdir_0.1.0` by
the last commit of version 0.1.0. Its graph computes as that version did.
"""

import pathlib
import zipfile

import numpy as np
import pytest

import clsa_tf
from clsa_tf.errors import UserError
from clsa_tf.training.checkpoint import load_trained
from export.deployment import exported_versions
from export.embedding import encoders
from export.model import card
from export.serving.servable import open_version
from tests import exports

DATA = pathlib.Path(__file__).parent / "data"
PIXELS = exports.noise(2)
# Identity of the model in `.parts` directories of version 0.1.0.
IDENTITY = (
    "sha256:a1fac7f724ea76b90f8e83ddaa7ef7212d36e5a71da8a1b8af137b70557b7620"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory of versions; the only one is 1."""
    base = tmp_path_factory.mktemp("models")
    with zipfile.ZipFile(DATA / "export_0.1.0.zip") as archive:
        archive.extractall(base / "1")
    return base


@pytest.fixture(scope="module")
def served(base):
    """The model as the embedded server loads it, warmed up."""
    return open_version(str(base / "1"))


def test_the_embedded_server_loads_it(served):
    rows = served.run("images_uint8", {"images": PIXELS})
    assert {k: x.shape for k, x in rows.items()} == {
        "embedding": (2, 32),
        "projection": (2, 16),
    }
    # Images of --image_size are not resized.
    encoded = np.array([exports.encode(x) for x in PIXELS], object)
    others = served.run("serving_default", {"image_bytes": encoded})
    for name, row in rows.items():
        np.testing.assert_allclose(others[name], row, rtol=0, atol=1e-5)


def test_the_loaded_encoder_equals_the_served_one(base, served):
    expected = served.run("images_uint8", {"images": PIXELS})
    found = clsa_tf.load_encoder(base, outputs="both")(PIXELS)
    for name, rows in expected.items():
        np.testing.assert_allclose(
            found[name], rows, rtol=0, atol=1e-4 * np.abs(rows).max()
        )
    assert clsa_tf.image_size(base) == 32


def test_fingerprints_are_unchanged(base):
    encoder = load_trained(str(DATA / "workdir_0.1.0")).encoder
    text = (base / "1" / "model_card.json").read_text()
    assert f'"{card.fingerprint(encoder.variables)}"' in text
    assert encoders.fingerprint(str(base / "1")) == IDENTITY


def test_it_can_be_deployed(base):
    model = exported_versions.read(
        str(base), exported_versions.newest(str(base))
    )
    assert not model.marks_bad_images
    assert exported_versions.max_images(model) == 256
    assert exported_versions.warmup_images(model) == 1


def test_errors_name_its_version(base, tmp_path):
    damaged = tmp_path / "1"
    damaged.mkdir()
    for name in ("model_card.json", "saved_model.pb"):
        (damaged / name).write_bytes((base / "1" / name).read_bytes())
    with pytest.raises(UserError, match="written by clsa_tf 0.1.0; this is"):
        clsa_tf.load_encoder(damaged)
