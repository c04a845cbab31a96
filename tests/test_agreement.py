"""The embedded server against recorded answers of TensorFlow Serving."""

import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests import agreement
from tests.server import ServerProcess, models_config, monitoring_flag

README = pathlib.Path(__file__).parent.parent / "export" / "README.md"
REQUESTS = agreement.read()
CONFIG = (
    "model_version_policy { all {} } "
    'version_labels { key: "stable" value: 1 } '
    'version_labels { key: "canary" value: 2 }'
)
# Where the servers differ on purpose: request -> words of export/README.md.
PAGE = "an HTML page or an empty body"
REJECTED = [(400, "text")]
PARSER = "that violate the HTTP standard"
WRAP = "integers that their type cannot hold"
DIFFERENT = {  # and the answer of the embedded server
    "images_uint8 pixel = 256": (WRAP, [(400, "error")]),
    "images_uint8: int_val 300": (WRAP, "INVALID_ARGUMENT"),
    "GET /metrics": ("`GET /metrics`", [(200, "text")]),
    "GET v1/models/m": (PARSER, REJECTED),
    "CONNECT :predict": (PARSER, [(400, "error")]),
    "FOO :predict": (PARSER, REJECTED),
    "chunked: bad size": (PARSER, REJECTED),
    "Content-Length too small": (PARSER, REJECTED),
    "both CL and chunked": (PARSER, REJECTED),
    "keep-alive: GET /nothing then good": (
        "closes the connection",
        [(404, "error"), (200, "predictions")],
    ),
}


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory):
    """A server with the recorded one's settings and another export."""
    folder = tmp_path_factory.mktemp("served")
    for version in ("1", "2"):
        shutil.copytree(exported.path, folder / "m" / version)
    config = folder / "models.config"
    config.write_text(models_config(m=(folder / "m", CONFIG)))
    with ServerProcess(
        f"--model_config_file={config}",
        monitoring_flag(folder),
        "--allow_version_labels_for_unavailable_models",
    ) as process:
        process.wait_for_error("loaded version 1 of m")
        yield process
        assert "Traceback" not in process.errors()


@pytest.fixture(scope="module")
def model(exported):
    return tf.saved_model.load(exported.path)


@pytest.mark.parametrize("one", REQUESTS, ids=lambda one: one["name"])
def test_answers_equal_those_of_tensorflow_serving(server, model, one):
    expected = agreement.expected(one)
    received, content = agreement.received(server, one)
    if one["name"] in DIFFERENT:
        assert received == DIFFERENT[one["name"]][1] != expected
        return
    if one["kind"] == "grpc":
        assert received == expected, content
    else:
        assert len(received) == len(expected), content
        for found, wanted in zip(received, expected):
            assert found == wanted or _is_page(*wanted), content
            assert found[0] == wanted[0], content
    if _is_prediction(one, received):
        assert_numbers(model, one, content)


def _is_page(status, shape):
    """Whether it is an error without JSON; ours has JSON, see `PAGE`."""
    return status >= 400 and shape != "error"


def _is_prediction(one, received):
    if one["kind"] == "grpc":
        return received == "OK" and one["method"].endswith("/Predict")
    return received[-1] in ((200, "predictions"), (200, "outputs"))


def assert_numbers(model, one, content):
    """Compares with the outputs of the SavedModel, bit for bit."""
    signature, inputs = agreement.inputs(one)
    run = model.signatures[signature or "serving_default"]
    expected = run(**{k: tf.constant(v) for k, v in inputs.items()})
    found = agreement.outputs(one, content)
    assert found.keys() <= expected.keys() and found
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name].numpy())


def test_both_protocols_are_covered():
    kinds = [one["kind"] for one in REQUESTS]
    assert kinds.count("http") >= 60 and kinds.count("grpc") >= 30


@pytest.mark.parametrize(
    "words", sorted({PAGE, *(words for words, _ in DIFFERENT.values())})
)
def test_differences_are_documented(words):
    text = README.read_text(encoding="utf-8")
    section = text.split("\n## Where the embedded server differs")[1]
    assert words in section.split("\n## ")[0]
