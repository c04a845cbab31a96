"""Conventions of the code."""

import ast
import inspect
import pathlib
import re
import subprocess

import pytest
import tensorflow as tf
from absl import flags

from clsa_tf import config, losses

SOURCES = sorted(
    path
    for folder in ("clsa_tf", "export")
    for path in pathlib.Path(folder).rglob("*.py")
)
ENTRY_POINTS = {
    "train.py",
    "report.py",
    "gallery.py",
    "data_service.py",
    # export/
    "savedmodel.py",
    "server.py",
    "client.py",
    "embed.py",
    "deploy.py",
    "formats.py",
    # Modules that they share.
    "parser.py",
    "config.py",
    "launch.py",
    "flags.py",
}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_is_random_without_a_seed(path):
    text = path.read_text()
    stateful = re.findall(
        r"tf\.random\.(?!stateless_|experimental\.stateless_|set_seed)\w+"
        r"|np\.random\.(?!default_rng\()\w+|default_rng\(\)"
        r"|^import random|tf\.image\.random_\w+",
        text,
        re.MULTILINE,
    )
    assert stateful == []


def test_one_place_computes_the_steps_of_an_epoch():
    """And one knows that a batch is larger than the dataset."""
    for division, places in (
        (
            r"// (\w+\.)*(config|self)\.batch_size",
            # Steps of an epoch, and the step of an example.
            ["clsa_tf/config_fields.py", "clsa_tf/data/batch_parts.py"],
        ),
        (r"batch_size > (\w+\.)*size", ["clsa_tf/data/source_checks.py"]),
    ):
        found = [p for p in SOURCES if re.search(division, p.read_text())]
        assert sorted(map(str, found)) == places


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_random_numbers_name_their_algorithm(path):
    """TensorFlow's default depends on the device."""
    unnamed = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and re.search(r"\brandom\..*stateless_", ast.unparse(node.func))
        and "'philox'" not in map(ast.unparse, _arguments(node))
    ]
    assert unnamed == []


def _arguments(call):
    return [*call.args, *(keyword.value for keyword in call.keywords)]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_only_entry_points_import_flags(path):
    if path.name not in ENTRY_POINTS:
        assert "import flags" not in path.read_text()


@pytest.mark.parametrize("dtype", [tf.float16, tf.float32, tf.float64])
@pytest.mark.parametrize("name", losses.__all__)
def test_losses_are_pure_functions_of_rows(name, dtype):
    function = getattr(losses, name)
    x = tf.cast(tf.random.stateless_uniform([3, 5], [1, 2]), dtype)
    example_ids = tf.range(3)
    call = {
        "cacr_attraction": lambda: function(x, [x], sharpness=1.0),
        "cacr_euclidean": lambda: function(
            [x], x, example_ids, temperature=0.2
        ),
        "cacr_rbf": lambda: function([x], x, example_ids, temperature=0.2),
        "cacr_repulsion": lambda: function(x, x, example_ids, sharpness=1.0),
        "cosines": lambda: function(x, x)[0],
        "ddm": lambda: function([x], [x], temperature=0.2),
        "info_nce": lambda: function(x, example_ids, temperature=0.2),
        "nt_xent": lambda: function(x, x, x, example_ids, temperature=0.2),
        "regression": lambda: function(x, x),
        "teacher_entropy": lambda: function([x], temperature=0.2),
    }[name]
    assert call().shape == [3]
    # Low precision would underflow; high precision is kept.
    assert call().dtype == max(dtype, tf.float32, key=lambda d: d.size)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("temperature", "sharpness"):
            assert parameter.kind is parameter.KEYWORD_ONLY
    assert "[N" in function.__doc__  # states shapes


@pytest.mark.parametrize(
    "path", sorted(pathlib.Path("configs").rglob("*.*")), ids=str
)
def test_every_config_is_documented(path):
    """On a page, or, of methods that no page has, by the comment at its head.

    A method that somebody adds needs no other edit than its two files.
    """
    pages = [pathlib.Path("README.md"), *pathlib.Path("docs").glob("*.md")]
    text = "".join(page.read_text() for page in pages)
    config = path.read_text()
    method = re.search(r"^--method=(\w+)$", config, re.MULTILINE)
    if method and f"`{method[1]}`" not in text:
        assert config.startswith("# ")
    else:
        assert f"{path}" in text


@pytest.mark.parametrize(
    "path", sorted(pathlib.Path("configs/cluster").iterdir())
)
def test_cluster_examples_use_existing_flags(path):
    text = path.read_text()
    assert "clsa_tf.train" in text
    values = flags.FlagValues()
    config.define_flags(values)
    # gcloud and the scheduler have flags of their own.
    ours = re.findall(r"--([a-z_]+)=", text.split("clsa_tf.train")[-1])
    assert set(ours) <= {*values, "flagfile"}
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)
