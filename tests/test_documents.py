"""Commands in documents and help texts: each has to be one that works."""

import importlib
import pathlib
import re
import shlex

import pytest
from absl import flags

from clsa_tf import config
from clsa_tf.cli import parser
from tests.test_help import COMMANDS

DOCUMENTS = (
    "README.md",
    "export/README.md",
    "docs/first-day.md",
    *map(str, sorted(pathlib.Path("configs").rglob("*.flags"))),
    *(f"{name.replace('.', '/')}.py" for name in COMMANDS),
)
# A line of its own, maybe behind a prompt or a comment's sign, and those that
# it goes on in.
COMMAND = re.compile(
    r"^(?:#? {2,})(?:\$ )?(?:\.venv/bin/)?python -m "
    r"((?:clsa_tf|export)\.\w+)((?:.*\\\n)*.*)$",
    re.MULTILINE,
)
# Commands whose flags make a `Config`.
RUNS = ("clsa_tf.train", "clsa_tf.gallery")


def commands():
    """(document, module, arguments), each once."""
    found = {}
    for document in DOCUMENTS:
        # (In a docstring the backslash before the end of a line is doubled.)
        text = pathlib.Path(document).read_text().replace("\\\\\n", "\\\n")
        for module, rest in COMMAND.findall(text):
            words = shlex.split(rest.replace("\\\n", " "), comments=True)
            ends = [i for i, word in enumerate(words) if word in ("|", "&")]
            words = words[: ends[0]] if ends else words
            found[document, module, tuple(words)] = None
    return [*found]


def name(value):
    return " ".join(value) if isinstance(value, tuple) else value


def test_they_are_found():
    found = {(document, module) for document, module, _ in commands()}
    own = zip(DOCUMENTS[-len(COMMANDS) :], COMMANDS)
    assert found >= set(own)
    assert {"README.md", "export/README.md", "docs/first-day.md"} <= {
        document for document, _ in found
    }
    lines = [words for _, _, words in commands()]
    # With continuation, comment, prompt and pipe.
    for words in (
        "--flagfile=configs/clsa.flags --dataset=folder:/photos "
        "--workdir=runs/photos --total_epochs=100",
        "--flagfile=configs/clsa.flags --tpu=local",
        "--flagfile=photos --dataset=photos --workdir=runs/photos",
        "--server=localhost:8500 --model=photos photos/stray.jpg",
    ):
        assert tuple(words.split()) in lines


@pytest.mark.parametrize("document, module, words", commands(), ids=name)
def test_their_flags_are_those_of_the_command(document, module, words):
    values = flags.FlagValues()
    importlib.import_module(module).define_flags(values)
    if not words:  # the command is named
        return
    positional = module == "export.client"
    parser.parse(words, values, positional=positional)
    if module in RUNS:
        config.from_flags(values)
