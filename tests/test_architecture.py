"""How the parts of the package stand on each other, read from its source."""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import jaxmp

ROOT = Path(jaxmp.__file__).parent
MOST_LINES = 400

GROUND_FLOOR = {
    "errors": set(),
    "_tree": set(),
    "_jaxpr": {"errors", "_tree"},
    "_transformations": {"errors", "_tree"},
    "_views": {"errors"},
    "_warnings": {"_jaxpr"},
}
"""What everything else may import; nothing of it knows a package above."""

GROUND = set(GROUND_FLOOR)
MAY_IMPORT = {
    **GROUND_FLOOR,
    "policy": GROUND,
    "quantization": GROUND | {"policy"},
    "casting": GROUND | {"policy", "quantization"},
    "loss_scale": GROUND | {"policy"},
    "optimizers": GROUND | {"policy"},
    "sharding": GROUND | {"policy", "loss_scale"},
    "modules": GROUND | {"policy", "casting"},
    "report": GROUND | {"policy", "casting"},
    "numerics": GROUND | {"policy", "quantization", "casting", "loss_scale"},
    "training": GROUND | {"policy", "loss_scale", "optimizers"},
    "testing": GROUND | {"policy", "report"},
    "cli": GROUND | {"policy", "casting", "loss_scale", "numerics", "report"},
    # The everyday names, and `python -m jaxmp`.
    "__init__": GROUND
    | {"policy", "casting", "loss_scale", "optimizers", "sharding"}
    | {"modules", "numerics", "report", "testing", "training"},
    "__main__": {"cli"},
}
"""What a part of the package may import besides itself, each after those it may."""


class Import(NamedTuple):
    """A file imports another: `target` is a module of jaxmp, `name` what is taken."""

    target: str
    name: str
    line: int


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def imports_in(source: str) -> Iterator[Import]:
    """What a file imports of jaxmp, at its top and in its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole path"
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for target, name in found:
            is_module = f"{target}.{name}" in FILES
            target = f"{target}.{name}" if is_module else target
            if target.split(".")[0] == "jaxmp":
                yield Import(target, "" if is_module else name, node.lineno)


@functools.cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(imports_in(FILES[module].read_text()))


def part_of(module: str) -> str:
    """The part of the package that a module belongs to: a key of `MAY_IMPORT`."""
    _, *parts = module.split(".")
    return parts[0] if parts else "__init__"


def imported_by(module: str) -> set[str]:
    return {found.target for found in imports_of(module)}


def circle_from(start: str, following: Callable[[str], set[str]]) -> list[str]:
    """The shortest way that leads from a file back to itself; empty without one."""
    ways, seen = [[start]], set()
    for way in ways:
        for target in following(way[-1]) - seen:
            if target == start:
                return [*way, start]
            seen.add(target)
            ways.append([*way, target])
    return []


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_stands_below_it(part):
    for module in FILES:
        if part_of(module) != part:
            continue
        for found in imports_of(module):
            above = part_of(found.target)
            place = f"{module}, line {found.line}"
            assert above in {part, *MAY_IMPORT[part]}, f"{place} imports {above}"


def test_every_part_has_its_place_and_stands_on_parts_before_it():
    assert {part_of(module) for module in FILES} == set(MAY_IMPORT)
    below = set()
    for part, others in MAY_IMPORT.items():
        assert others <= below, f"{part} may import {others - below}, which come later"
        below.add(part)


@pytest.mark.parametrize("module", FILES)
def test_private_files_are_imported_in_their_own_part_and_private_names_nowhere(module):
    for found in imports_of(module):
        place = f"line {found.line} imports {found.target} {found.name}"
        assert not found.name.startswith("_"), place
        if part_of(found.target) not in {part_of(module), *GROUND}:
            inside = found.target.split(".")[2:]
            assert not any(name.startswith("_") for name in inside), place


@pytest.mark.parametrize("module", FILES)
def test_no_file_imports_itself_through_others(module):
    circle = circle_from(module, imported_by)
    assert not circle, " -> ".join(circle)


def test_a_circle_is_found():
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"b", "a"}, "d": set()}
    assert circle_from("a", graph.__getitem__) == ["a", "b", "c", "a"]
    assert circle_from("b", graph.__getitem__) == ["b", "c", "b"]
    assert circle_from("d", graph.__getitem__) == []


@pytest.mark.parametrize("module", FILES)
def test_a_file_can_be_read_in_one_sitting(module):
    assert len(FILES[module].read_text().splitlines()) < MOST_LINES


def test_imports_are_found_wherever_they_stand():
    source = """
import numpy
import jaxmp.errors
from jaxmp import _tree, get_policy
from jaxmp.policy._casts import cast
def fn():
    from jaxmp._jaxpr import walk
"""
    assert list(imports_in(source)) == [
        ("jaxmp.errors", "", 3),
        ("jaxmp._tree", "", 4),
        ("jaxmp", "get_policy", 4),
        ("jaxmp.policy._casts", "cast", 5),
        ("jaxmp._jaxpr.walk", "", 7),
    ]
