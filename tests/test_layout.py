"""Rooms: which part of the library may import which."""

import ast
import pathlib

import pytest

# From the bottom up. Each room may import itself and all rooms above it in this
# list, but no other room of its tuple. BUILD.md describes the rooms.
LAYERS = (
    ("errors", "stack", "text"),
    ("files",),
    ("terminal",),
    ("augment", "distributed", "losses"),
    ("networks", "optimizers"),
    ("data",),
    ("options",),
    ("methods",),
    ("cli", "config_fields"),
    ("config",),
    ("evaluation",),
    ("plots",),
    ("training",),
    ("api",),
    ("train", "report", "gallery", "data_service"),
)
HEIGHT = {room: i for i, layer in enumerate(LAYERS) for room in layer}
ROOT = pathlib.Path("clsa_tf")
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT) + [
    path for path in sorted(ROOT.glob("*.py")) if path.stem != "__init__"
]


def imported(path):
    """Yields the names of all modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def room(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_rooms_import_lower_rooms_only(path):
    own = room(path)
    for name in imported(path):
        top, *rest = name.split(".")
        assert top != "export", f"{path} imports {name}"
        if top != "clsa_tf":
            continue
        # `clsa_tf.__version__` and the package itself belong to no room.
        other = rest[0] if rest else ""
        if other in ("", "__version__") or other == own:
            continue
        assert HEIGHT[other] < HEIGHT[own], f"{path} imports {name}"


def test_every_room_is_in_a_layer():
    assert {room(path) for path in FILES} == {*HEIGHT}


@pytest.mark.parametrize(
    "path", sorted(pathlib.Path("export").rglob("*.py")), ids=str
)
def test_exports_import_no_entry_point(path):
    entry_points = {f"clsa_tf.{name}" for name in LAYERS[-1]}
    assert not {
        name
        for name in imported(path)
        for point in entry_points
        if name == point or name.startswith(f"{point}.")
    }
