"""What the docs show runs: examples in docstrings, and Python blocks in Markdown."""

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import jaxmp

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


# Docstrings


def docstring_examples():
    """Every docstring of jaxmp with an example, private modules included."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for module in pkgutil.walk_packages(jaxmp.__path__, "jaxmp."):
        if not module.name.endswith("__main__"):
            yield from finder.find(importlib.import_module(module.name))
    yield from finder.find(jaxmp)


EXAMPLES = {test.name: test for test in docstring_examples() if test.examples}


def run_example(test):
    runner = doctest.DebugRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test, clear_globs=False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring_runs(name):
    try:
        run_example(EXAMPLES[name])
    except doctest.DocTestFailure as failure:
        pytest.fail(
            f"{failure.example.source}expected: {failure.example.want}"
            f"     got: {failure.got}"
        )


def test_a_wrong_example_is_noticed():
    parse = doctest.DocTestParser().get_doctest
    for source in (">>> 1 + 1\n3\n", ">>> unknown_name\n"):
        with pytest.raises((doctest.DocTestFailure, doctest.UnexpectedException)):
            run_example(parse(source, {}, "wrong", None, 0))


# Markdown

BLOCK = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(text, language):
    """The code blocks of a page in a language, each with the line it starts on."""
    for match in BLOCK.finditer(text):
        indent, found, code = match.groups()
        if found == language:
            line = text.count("\n", 0, match.start(3))
            yield line, re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


def run_page(path, text):
    """Runs the blocks of a page one after the other, as a reader would paste them."""
    namespace = {"__name__": path.stem}
    # Public models promote ranks, as JAX lets them.
    ranks = "allow" if "transformers" in text else "raise"
    with jax.numpy_rank_promotion(ranks):
        _run_blocks(path, text, namespace)


def _run_blocks(path, text, namespace):
    for line, code in blocks(text, "python"):
        tree = ast.increment_lineno(ast.parse(code, str(path)), line)
        exec(compile(tree, str(path), "exec"), namespace)


NEED_DEVICES = {"distributed.md": 8}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            marks=pytest.mark.devices(NEED_DEVICES.get(path.name, 1)),
            id=path.name,
        )
        for path in PAGES
    ],
)
def test_the_python_blocks_of_a_page_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(path, path.read_text())


def test_a_wrong_block_is_noticed():
    page = Path("page.md")
    good = "text\n```python\nx = 1\n```\n"
    run_page(page, good + "```python\nassert x == 1\n```\n")
    run_page(page, good + "```diff\n-not python\n```\n```bash\nfalse\n```\n")
    for wrong in ("assert x == 2", "x = = 2", "  y = 1", "unknown_name"):
        with pytest.raises((AssertionError, SyntaxError, NameError)) as caught:
            run_page(page, good + f"```python\n{wrong}\n```\n")
        assert "page.md" in str(caught.getrepr(style="native"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_says_what_it_is(path):
    for match in BLOCK.finditer(path.read_text()):
        assert match.group(2), f"a block without a language: {match.group(3)[:60]}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    prose = BLOCK.sub("", path.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        if "://" not in target:
            assert (path.parent / target).exists(), target


NAMED = re.compile(
    r"`((?:tests|examples|docs)/[\w./]+)"
    r"|(?<![\w/.])((?:tests|examples|docs|jaxmp)/[\w./-]+\.\w+)"
)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_files_that_a_page_names_exist(path):
    for names in NAMED.findall(path.read_text()):
        assert all((ROOT / name).exists() for name in names), names


def test_readme_has_two_set_up_commands_of_one_line():
    commands = [code for _, code in blocks((ROOT / "README.md").read_text(), "bash")]
    assert [command.count("\n") for command in commands] == [1, 1]
    assert "examples/train_lm.py" in commands[0]
    assert "-m pytest" in commands[1]
    for command in commands:
        assert command.startswith("python3 -m venv .venv && ")
