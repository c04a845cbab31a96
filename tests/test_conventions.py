"""The manners of the code that a reader relies on."""

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
    "config.py",
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


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_flags_are_known_to_entry_points_only(path):
    if path.name not in ENTRY_POINTS:
        assert "import flags" not in path.read_text()


@pytest.mark.parametrize(
    "name", ["info_nce", "ddm", "teacher_entropy", "cosines"]
)
def test_losses_are_pure_functions_of_rows(name):
    function = getattr(losses, name)
    x = tf.random.stateless_uniform([3, 5], [1, 2])
    call = {
        "info_nce": lambda: function(x, tf.range(3), temperature=0.2),
        "ddm": lambda: function([x], [x], temperature=0.2),
        "teacher_entropy": lambda: function([x], temperature=0.2),
        "cosines": lambda: function(x, x)[0],
    }[name]
    assert call().shape.rank == 1
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "temperature":
            assert parameter.kind is parameter.KEYWORD_ONLY
    assert "[N" in function.__doc__  # shapes are said


@pytest.mark.parametrize("path", sorted(pathlib.Path("configs").rglob("*.*")))
def test_every_config_is_documented(path):
    assert f"{path}" in pathlib.Path("README.md").read_text()


@pytest.mark.parametrize(
    "path", sorted(pathlib.Path("configs/cluster").iterdir())
)
def test_cluster_examples_run_the_command_that_users_know(path):
    text = path.read_text()
    assert "clsa_tf.train" in text
    values = flags.FlagValues()
    config.define_flags(values)
    # gcloud and the scheduler have flags of their own.
    ours = re.findall(r"--([a-z_]+)=", text.split("clsa_tf.train")[-1])
    assert set(ours) <= {*values, "flagfile"}
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)
