"""The tutorials: notebooks in Markdown, which the site runs when it is built."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))
CELL = re.compile(
    r"^```\{code-cell\} ipython3\n((?::\w[^\n]*\n)*)(.*?)^```", re.MULTILINE | re.DOTALL
)
every_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def program(path):
    """The cells of a tutorial as one program, line by line where they stand."""
    text = path.read_text()
    lines = [""] * (text.count("\n") + 1)
    for cell in CELL.finditer(text):
        start = text.count("\n", 0, cell.start(2))
        code = cell.group(2).splitlines()
        lines[start : start + len(code)] = code
    return "\n".join(lines)


def imports(path):
    """The packages that a tutorial imports."""
    for node in ast.walk(ast.parse(program(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@every_tutorial
def test_a_tutorial_checks_what_it_claims(path):
    cells = ast.parse(program(path), str(path))
    assert any(isinstance(node, ast.Assert) for node in ast.walk(cells))


@every_tutorial
def test_every_cell_is_one_that_the_site_runs(path):
    text = path.read_text()
    assert text.startswith("---\nfile_format: mystnb\n")
    assert text.count("```{code-cell}") == len(CELL.findall(text))


@pytest.mark.slow
@every_tutorial
def test_a_tutorial_runs(path, tmp_path):
    missing = [name for name in imports(path) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: pip install -e '.[docs]'")
    source = tmp_path / path.with_suffix(".py").name
    source.write_text(program(path))
    subprocess.run([sys.executable, source], cwd=tmp_path, check=True, timeout=600)
