"""How avppc/ is laid out: small files in small folders, and imports that point to earlier rooms alone."""

from __future__ import annotations

import ast
import graphlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "avppc"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(("avppc", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
ROOMS = [
    "_version",
    "checks",
    "files",
    "settings",
    "clip",
    "draws",
    "processes",
    "printing",
    "ops",
    "losses",
    "models",
    "data",
    "synth",
    "tasks",
    "train",
    "evaluate",
    "export",
    "doctor",
    "config",
    "flags",
    "cli",
    "__main__",
    "__init__",
]
"""The parts of the package: each imports from those before it."""


def test_files_are_few_and_short() -> None:
    assert len(FILES) <= 150
    assert {path.name: lines for path in FILES if (lines := len(path.read_text().splitlines())) > 400} == {}
    folders = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in FILES)
    assert {folder: count for folder, count in folders.items() if count > 14} == {}


def test_a_name_does_not_repeat_its_folder() -> None:
    """The main module of a folder has its name (table/table.py); the others have no word of it."""
    for path in FILES:
        stem, folder = path.stem, path.parent.name
        assert stem == folder or not set(stem.split("_")) & set(folder.split("_")), path


def imports_of(path: Path) -> Iterator[str]:
    """Modules of the package that are imported together with this one: not inside functions, not for types alone."""
    nodes: list[ast.stmt] = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("avppc."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "avppc":
            assert node.level == 0
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Try):
            nodes += [*node.body, *node.orelse, *node.finalbody, *(line for one in node.handlers for line in one.body)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            nodes += [*node.body, *node.orelse]


ARROWS = {module: {name for name in imports_of(path) if name in MODULES} for module, path in MODULES.items()}


def test_imports_point_to_earlier_rooms() -> None:
    places = {room: place for place, room in enumerate(ROOMS)}
    assert places.keys() == {module.split(".")[1] for module in MODULES}
    for module, arrows in ARROWS.items():
        for other in arrows:
            assert places[other.split(".")[1]] <= places[module.split(".")[1]], f"{module} imports {other}"


@pytest.mark.parametrize("folder", sorted({module.rpartition(".")[0] for module in MODULES}))
def test_no_folder_has_a_circle(folder: str) -> None:
    """Neither its modules nor its folders, each taken as a whole, import each other in a circle."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, others in ARROWS.items():
        for other in others:
            if module.startswith(f"{folder}.") and other.startswith(f"{folder}."):
                one, two = (name.removeprefix(f"{folder}.").split(".")[0] for name in (module, other))
                if one != two:
                    arrows[one].add(two)
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError
