"""Documents: their commands can be parsed, and their links have targets."""

import importlib
import pathlib
import re
import shlex

import pytest
from absl import flags

from clsa_tf import config
from clsa_tf.cli import parser
from tests.test_help import COMMANDS

PAGES = (
    "README.md",
    "export/README.md",
    *map(str, sorted(pathlib.Path("docs").glob("*.md"))),
)
DOCUMENTS = (
    *PAGES,
    *map(str, sorted(pathlib.Path("configs").rglob("*.flags"))),
    *(f"{name.replace('.', '/')}.py" for name in COMMANDS),
)
# An indented line, maybe after a prompt or a comment's sign, and the lines that
# continue it.
COMMAND = re.compile(
    r"^(?:#? {2,})(?:\$ )?(?:\.venv/bin/)?python -m "
    r"((?:clsa_tf|export)\.\w+)((?:.*\\\n)*.*)$",
    re.MULTILINE,
)
# Commands whose flags make a `Config`.
RUNS = ("clsa_tf.train", "clsa_tf.gallery")
# Pages about Python code.
WITHOUT_COMMANDS = {"docs/python.md"}
LINKED = (*PAGES, "BUILD.md", "benchmarks/README.md")


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


def test_commands_of_all_documents_are_found():
    found = {(document, module) for document, module, _ in commands()}
    own = zip(DOCUMENTS[-len(COMMANDS) :], COMMANDS)
    assert found >= set(own)
    documents = {document for document, _ in found}
    assert {*PAGES} - documents == WITHOUT_COMMANDS
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
def test_flags_of_documented_commands_exist(document, module, words):
    values = flags.FlagValues()
    importlib.import_module(module).define_flags(values)
    if not words:  # only the name of the command
        return
    positional = module == "export.client"
    parser.parse(words, values, positional=positional)
    if module in RUNS:
        config.from_flags(values)


# ---- Links


def outside_code(text):
    """Lines of a page, without blocks of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [s for s in text.split("\n") if not s.startswith("    ")]


def anchors(path):
    """Fragments by which GitHub names the headings of a page."""
    headings = (
        line.lstrip("#").strip()
        for line in outside_code(path.read_text())
        if line.startswith("#")
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def links(document):
    """(path, fragment) of the links of a page to files of this repository."""
    page = pathlib.Path(document)
    text = "\n".join(outside_code(page.read_text()))
    targets = re.findall(r"\]\(([^)]+)\)|^\[\w+\]: (.+)$", text, re.MULTILINE)
    for target in map("".join, targets):
        if not target.startswith("https://"):
            path, _, fragment = target.partition("#")
            yield (page.parent / path if path else page), fragment


@pytest.mark.parametrize("document", LINKED)
def test_links_have_targets(document):
    found = [*links(document)]
    assert found or document in ("BUILD.md", "benchmarks/README.md")
    for path, fragment in found:
        assert path.exists(), path
        assert not fragment or fragment in anchors(path), (path, fragment)


@pytest.mark.parametrize("document", LINKED)
def test_reference_links_are_defined(document):
    text = "\n".join(outside_code(pathlib.Path(document).read_text()))
    used = set(re.findall(r"\]\[(\w+)\]", text))
    assert used == set(re.findall(r"^\[(\w+)\]: ", text, re.MULTILINE))


def test_the_readme_is_short():
    lines = pathlib.Path("README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 100] == []


def test_every_page_is_linked_from_the_readme():
    linked = {path.resolve() for path, _ in links("README.md")}
    assert {pathlib.Path(page).resolve() for page in PAGES[1:]} <= linked
