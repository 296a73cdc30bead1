"""The rules of the house: arrows point down, rooms keep their shape."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "casm_fast"
ROOMS = ["blur_mask", "contour_boxes", "jitter_mask", "mask_boxes", "tv_norm"]
CPU_ROOMS = ["contour_boxes"]  # one pixel after the other: nothing for a GPU to do at once

# Floors from the ground up. A module may import from floors below its own, and from its own part.
FLOORS = [
    {"_C"},
    {"ops"},
    {"models", "data"},
    {"training", "extraction", "perturbation", "evaluation", "report"},
    {"attribution"},
    {"experiments", "doctor"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR_OF = {part: level for level, parts in enumerate(FLOORS) for part in parts}


def part_of(module: str) -> str:
    """The part of the house that a dotted name lies in: casm_fast.ops.tv_norm -> ops."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "casm_fast":
            modules = [f"casm_fast.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules = [node.module]
        else:
            continue
        parts |= {part_of(name) for name in modules if name.split(".")[0] == "casm_fast"}
    return parts


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_down(path):
    here = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert here in FLOOR_OF, f"{here} has no floor: add it to FLOORS"
    for part in imported_parts(path) - {here}:
        if here == "__init__" or part == "__init__":
            continue  # the front door names everything, and __version__ may be asked for anywhere
        assert FLOOR_OF[part] < FLOOR_OF[here], f"{path.name}: {here} must not import {part}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_only_the_cli_needs_tyro(path):
    if path.name != "cli.py":
        assert not re.search(r"^\s*(import|from) tyro", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_complete(room):
    folder = ROOT / "csrc" / room
    expected = {f"{room}.h", f"{room}.cpp", f"{room}_cpu.cpp", f"{room}_cuda.cu"}
    if room in CPU_ROOMS:
        expected -= {f"{room}_cuda.cu"}
    assert expected <= {path.name for path in folder.iterdir()}
    for path in (
        PACKAGE / "ops" / f"{room}.py",
        ROOT / "tests" / f"test_{room}.py",
        ROOT / "benchmarks" / f"bench_{room}.py",
    ):
        assert path.exists(), f"{path.relative_to(ROOT)} is missing"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_never_include_rooms(room):
    for path in (ROOT / "csrc" / room).iterdir():
        included = re.findall(r'#include "([a-z_]+)/', path.read_text())
        assert set(included) <= {room, "common"}, f"{path.name} includes {included}"


def test_no_file_is_named_after_nothing():
    names = {path.stem for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils", "helpers", "misc", "common"}
