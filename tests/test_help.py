"""The text of `--help`."""

import dataclasses
import importlib
import re
import runpy
import sys

import pytest
from absl import flags

from clsa_tf import config as config_lib
from clsa_tf import gallery, methods, train
from clsa_tf.cli import help_page
from clsa_tf.errors import UserError
from clsa_tf.options.fields import GROUPS, choices_of
from clsa_tf.options.flags import spell
from export import savedmodel

# Flags of every command.
ALWAYS = {"flagfile", "help", "version"}
COMMANDS = (
    "clsa_tf.train",
    "clsa_tf.gallery",
    "clsa_tf.report",
    "clsa_tf.data_service",
    "export.savedmodel",
    "export.server",
    "export.client",
    "export.embed",
    "export.deploy",
    "export.formats",
)


def call(module, *arguments, monkeypatch):
    """Runs a command in this process; returns its status."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return end.value.code


def page(define_flags, *arguments, width=80):
    values = flags.FlagValues()
    define_flags(values)
    return help_page.render("What it does.", values, arguments, width)


def entries(text):
    """Flag -> (its group, its text in one line)."""
    found, group, name = {}, "", ""
    for block in re.split(r"\n(?=\S|  -)", text):
        line = " ".join(block.split())
        match = re.match(r"  --(?:\[no\])?(\w+)", block)
        if match:
            name = match.group(1)
            assert name not in found
            found[name] = (group, line)
        elif line.endswith(":"):
            group = line
    return found


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_command_has_help(module, monkeypatch, capsys):
    assert call(module, "--help", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    summary, example = printed.out.split("\n\n")[:2]
    assert summary.endswith(".")
    assert f"    python -m {module} --" in example
    assert max(map(len, printed.out.splitlines())) <= 80
    found = entries(printed.out)
    assert ALWAYS <= found.keys()
    own = flags.FlagValues()
    importlib.import_module(module).define_flags(own)
    usual = methods.load("clsa").Options
    hidden = set(config_lib.names()) - {
        field.name
        for kind in (config_lib.Config, usual)
        for field in dataclasses.fields(kind)
    }
    assert found.keys() == {*own} - hidden | ALWAYS
    # Required flags come first.
    needed = [name for name in found if "(required)" in found[name][1]]
    assert list(found)[: len(needed)] == needed


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("flag", ["-h", "--helpfull", "--helpshort"])
def test_other_spellings_of_help_are_accepted(flag, monkeypatch, capsys):
    arguments = ("--batch_size=8", flag, "--nonsense")
    assert call("clsa_tf.report", *arguments, monkeypatch=monkeypatch) == 0
    assert "--workdir=PATH" in capsys.readouterr().out


@pytest.mark.parametrize("command", [train, gallery], ids=["train", "gallery"])
@pytest.mark.parametrize("method", methods.names())
def test_help_describes_every_option_of_the_configuration(command, method):
    text = page(command.define_flags, f"--method={method}")
    found = entries(text)
    config = config_lib.default(method)
    seen = set()
    for holder in (config, config.options):
        for field in dataclasses.fields(holder):
            if not field.metadata:
                continue
            group, line = found[field.name]
            seen.add(field.name)
            assert group == GROUPS[field.metadata["group"]] + ":"
            default = "clsa" if field.name == "method" else field.default
            assert f"default: {spell(default) or 'empty'})" in line
            for choice in choices_of(field) or ():
                assert re.search(rf"[{{ ,]{choice}[}},;]", line), choice
            words = field.metadata["help"].rstrip(".")
            assert " ".join(words.split()) in line
    assert not seen ^ (
        found.keys() - {*(*ALWAYS, "list_methods", "output", "images")}
    )
    assert f"--method={method}." in " ".join(text.split())


def test_groups_are_in_order():
    titles = [group for group, _ in entries(page(train.define_flags)).values()]
    assert list(dict.fromkeys(titles)) == [
        "Flags:",
        *(f"{title}:" for title in GROUPS.values()),
    ]
    for field in dataclasses.fields(config_lib.Config):
        if field.metadata and field.name != "method":
            assert field.metadata["group"] != "method", field.name


def test_a_flagfile_chooses_the_method_whose_flags_are_shown():
    found = entries(page(train.define_flags, "--flagfile=byol", "--help"))
    assert "default: 4096" in found["projection_hidden"][1]
    assert "view_solarize" in found and "temperature" not in found
    for words in (["--method=moco"], ["--method", "moco"]):
        again = page(train.define_flags, "--flagfile=byol", *words)
        assert "temperature" in entries(again)


def test_help_rejects_unknown_methods():
    with pytest.raises(UserError) as error:
        page(train.define_flags, "--method=nope", "--help")
    for value in ("byol, cacr", "'nope'", "--method"):
        assert value in str(error.value)


def test_after_two_dashes_help_is_not_a_flag():
    assert help_page.asked(["--x", "-h"])
    assert not help_page.asked(["--", "--help"])


@pytest.mark.parametrize("width", [40, 60, 100])
def test_help_fits_the_terminal(width):
    text = page(train.define_flags, width=width)
    for line in text.splitlines()[2:]:
        title = line.startswith(tuple(GROUPS.values()))
        assert len(line) <= width or len(line.split()) <= 1 or title


def test_flags_are_shown_as_they_are_typed():
    found = entries(page(savedmodel.define_flags))
    assert "--precision={float32,mixed_bfloat16" in found["precision"][1]
    assert "<float32" not in found["precision"][1]
    assert "--version=N" in found["version"][1]
    assert "--output=PATH" in found["output"][1]
    assert "--outputs=A,..." in found["outputs"][1]
    assert "default: embedding,projection)" in found["outputs"][1]
    assert "--[no]list_methods" in page(train.define_flags)
