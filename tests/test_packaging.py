"""The contents of the wheel, and the Python that `make setup` chooses."""

import configparser
import email
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import clsa_tf
from clsa_tf import stack
from clsa_tf.cli import scripts

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ("clsa_tf", "export", "configs")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def pip(*arguments):
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        + [*map(str, arguments)],
        check=True,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy, without files of an earlier build."""
    place = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, place / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, place / name)
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", place, place)
    (path,) = place.glob("*.whl")
    return path


def test_the_wheel_contains_all_modules_recipes_and_templates(wheel):
    expected = {
        str(path.relative_to(ROOT))
        for pattern in (
            "clsa_tf/**/*.py",
            "export/**/*.py",
            "export/templates/*",
        )
        for path in ROOT.glob(pattern)
        if path.is_file()
    } | {
        f"clsa_tf/{path.relative_to(ROOT)}"
        for path in ROOT.glob("configs/**/*.flags")
    }
    assert "clsa_tf/configs/cifar10/clsa.flags" in expected
    with zipfile.ZipFile(wheel) as file:
        found = {n for n in file.namelist() if ".dist-info/" not in n}
    assert found == expected


@pytest.mark.parametrize(
    "python, taken, not_taken",
    [
        ("3.9", {"tensorflow": "2.15.0", "keras": "2.15.0"}, {"tf-keras"}),
        ("3.11", {"tensorflow": "2.15.1", "numpy": "1.26.4"}, {"tf-keras"}),
        (
            "3.12",
            {"tensorflow": "2.21.0", "tf-keras": "2.21.0"},
            {"keras", "tensorflow-addons"},
        ),
        (
            "3.13",
            {"tensorboard": "2.21.0", "numpy": "2.5.5"},
            {"keras", "tensorflow-addons"},
        ),
    ],
)
def test_the_python_chooses_the_requirements(wheel, python, taken, not_taken):
    with zipfile.ZipFile(wheel) as file:
        (name,) = [n for n in file.namelist() if n.endswith("/METADATA")]
        metadata = email.message_from_bytes(file.read(name))
    pythons = SpecifierSet(metadata["Requires-Python"])
    assert python in pythons
    assert "3.8" not in pythons and "3.14" not in pythons
    environment = {"python_version": python, "extra": ""}
    found = {}
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or marker.evaluate(environment):
            assert requirement.name not in found
            found[requirement.name] = requirement.specifier
    for name, version in taken.items():
        assert version in found[name]
    assert not not_taken & found.keys()
    assert "2.22.0" not in found["tensorflow"]


@pytest.mark.slow
def test_commands_of_the_wheel_run_outside_the_checkout(wheel, tmp_path):
    pip("install", "-q", "--no-deps", "--no-index", "-t", tmp_path, wheel)
    (info,) = tmp_path.glob("*.dist-info")
    entries = configparser.ConfigParser()
    entries.read(info / "entry_points.txt")
    targets = entries["console_scripts"]
    for name, target in targets.items():
        module, _, function = target.partition(":")
        assert module == "clsa_tf.cli.scripts"
        (started,) = getattr(scripts, function).args
        assert (ROOT / f"{started.replace('.', '/')}.py").exists()
        assert (tmp_path / "bin" / name).exists()

    def run(*arguments):
        return subprocess.run(
            arguments,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    printed = run(tmp_path / "bin" / "clsa-deploy", "--version")
    assert printed == stack.describe() + "\n"
    assert f"clsa_tf {clsa_tf.__version__}\n" in printed
    # All of them start, in one process to save time.
    code = (
        "import sys\n"
        "from clsa_tf.cli import scripts\n"
        "for name in sys.argv[1].split():\n"
        "    sys.argv = [name, '--help']\n"
        "    try:\n"
        "        getattr(scripts, name)()\n"
        "    except SystemExit as end:\n"
        "        print('status', end.code, scripts.__file__)\n"
    )
    names = [target.partition(":")[2] for target in targets.values()]
    printed = run(sys.executable, "-c", code, " ".join(names))
    ended = f"status 0 {tmp_path}/clsa_tf/cli/scripts.py\n"
    assert printed.count(ended) == len(names) == 10
    for name in names:
        (started,) = getattr(scripts, name).args
        assert f"\n    python -m {started} --" in printed
    code = (
        "from clsa_tf.cli import flagfiles\n"
        "print(*flagfiles.recipes().values())\n"
        "print(flagfiles.expand(['--flagfile=clsa.flags'])[0])"
    )
    printed = run(sys.executable, "-c", code)
    assert f"{tmp_path}/clsa_tf/configs/cifar10/byol.flags" in printed
    assert str(ROOT) not in printed


# ---- environment.sh


def programs(folder, **bodies):
    """Shell scripts, by their names with a dot for `_`."""
    for name, body in bodies.items():
        path = folder / name.replace("_", ".")
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)


def find(folder, *versions, **environment):
    """Runs `environment.sh find` where only a folder's programs exist."""
    return subprocess.run(
        ["/bin/sh", ROOT / "environment.sh", "find", *versions],
        env={"PATH": str(folder)} | environment,
        capture_output=True,
        text=True,
    )


SHIM = "echo 'pyenv: command not found' >&2; exit 127"


def test_a_python_that_does_not_run_is_skipped(tmp_path):
    programs(tmp_path, python3_11=SHIM, python3_13=SHIM, python3_12="echo 3.12")
    result = find(tmp_path, "3.11", "3.13", "3.12", "3.10")
    assert result.stdout == "python3.12\n", result.stderr


def test_a_python_is_found_by_another_name_or_in_pyenv(tmp_path):
    programs(tmp_path, python3="echo 3.10", pyenv=f"echo {tmp_path}/root")
    place = tmp_path / "root/versions/3.13.1/bin"
    place.mkdir(parents=True)
    programs(place, python3="echo 3.13")
    # Free-threaded: TensorFlow needs the global interpreter lock.
    free = tmp_path / "root/versions/3.12.1t/bin"
    free.mkdir(parents=True)
    programs(free, python3="echo 3.12")
    assert find(tmp_path, "3.11", "3.12", "3.13").stdout == f"{place}/python3\n"
    assert find(tmp_path, "3.11", "3.10").stdout == "python3\n"


def test_no_working_python_is_an_error_in_one_sentence(tmp_path):
    programs(tmp_path, python3_11=SHIM)
    result = find(tmp_path, "3.11", "3.13")
    assert result.returncode == 1
    assert result.stderr.startswith("error: Expected one of Python 3.11 3.13 ")
    assert len(result.stderr.splitlines()) == 1
    result = find(tmp_path, "3.11", PYTHON="python3.11")
    assert result.returncode == 1
    assert "received PYTHON=python3.11" in result.stderr
