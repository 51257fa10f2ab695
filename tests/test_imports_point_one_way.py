"""The road has one direction: who may import whom inside the package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_lowmem

PACKAGE = Path(qlora_lowmem.__file__).parent
HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"}

# room -> rooms (or top-level modules) of the package that it must not import
FORBIDDEN = {
    "memory": {"gate", "report", "train", "plan"},
    "models": {"gate", "report", "memory", "tokens", "job", "execute", "train", "virtual_gpu"},
    "training": {"gate", "report", "job", "execute", "train"},
    "report": {"job", "execute", "train", "lean"},
    "tokens": {"gate", "report", "job", "execute", "train", "plan", "probes"},
    "probes": {"gate", "report", "train", "plan"},
}
# room -> the only parts of the package that it may import
ALLOWED = {"virtual_gpu": set(), "lean": set(), "recipe": {"units", "errors"}}


def project_imports(path: Path) -> set[str]:
    """The parts of the package that a file imports anywhere, `virtual_gpu` for `qlora_lowmem.virtual_gpu.cards`."""
    found = set()
    inside = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("qlora_lowmem.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level]
            found |= {base[0]} if base else {(node.module or "").split(".")[0]}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qlora_lowmem":
            rest = (node.module or "").split(".")[1:]
            found |= {rest[0]} if rest else {name.name for name in node.names}
    return found


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_that_stand_alone(room: str) -> None:
    for path in files_of(room):
        assert project_imports(path) - {room} <= ALLOWED[room], path


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_nothing_turns_back(room: str) -> None:
    for path in files_of(room):
        assert not project_imports(path) & FORBIDDEN[room], path


def imports_of(path: Path) -> Iterator[ast.AST]:
    """What a file imports anywhere; of one that opens tables, what it imports itself: it needs its library for that."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from tree.body if path.name == "tables.py" else ast.walk(tree)


@pytest.mark.parametrize("name", ["recipe", "data", "units", "errors", "environment", "command"])
def test_what_checks_input_imports_no_heavy_library(name: str) -> None:
    for node in (node for path in files_of(name) for node in imports_of(path)):
        if isinstance(node, ast.Import):
            assert not {part.name.split(".")[0] for part in node.names} & HEAVY
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] not in HEAVY
