"""The page on the design says which package may import which; the code keeps to it."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text()
TABLE = re.findall(r"^\| `(\w+)` \| .* \|(.*)\|$", PAGE, re.M)
MAY_IMPORT = {package: set(re.findall(r"`(\w+)`", cell)) for package, cell in TABLE}
GROUND_FLOOR = {"errors", "_tree", "_warnings", "_jaxpr", "_views", "_transformations"}


def files(package):
    path = ROOT / "jaxmp" / package
    return path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]


def imported(file):
    """What a file imports from jaxmp, as the parts of its path below jaxmp."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1:] for name in names if name.startswith("jaxmp."))


def test_the_table_lists_every_package():
    found = {path.stem for path in (ROOT / "jaxmp").iterdir()}
    assert set(MAY_IMPORT) == found - {"__init__", "__main__", "__pycache__", "py"}


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_what_it_may(package):
    allowed = MAY_IMPORT[package] | GROUND_FLOOR | {package}
    for file in files(package):
        for top, *inside in imported(file):
            assert top in allowed or package == "cli", (file, top, inside)


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_private_file_is_read_by_its_own_package(package):
    for file in files(package):
        for top, *inside in imported(file):
            if top not in GROUND_FLOOR | {package}:
                assert not any(name.startswith("_") for name in inside), (file, inside)


def test_imports_never_go_in_a_circle():
    done = set(GROUND_FLOOR)
    while remaining := {p for p in MAY_IMPORT if p not in done}:
        ready = {p for p in remaining if MAY_IMPORT[p] <= done}
        assert ready, remaining
        done |= ready
