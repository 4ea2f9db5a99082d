"""The page on measurements: it names every script and page, and its commands parse."""

import argparse
import importlib
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "how_we_measure.md"
PAGE = (ROOT / "docs" / NAME).read_text()
PAGES = [path for path in (ROOT / "docs").glob("*.md") if path.name != NAME]
SCRIPTS = [
    path
    for folder in ("examples", "examples/benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
]
COMMANDS = sorted(set(re.findall(r"`python ([^`]+)`", PAGE)))
SAYS_WHAT_PRINTS_IT = re.compile(
    r"[Pp]rinted by|`[^`]*python [^`]+`[^.|]{0,20} (prints|draws|writes)\b"
)


class Parsed(Exception):
    """A command line was read; nothing after that shall run."""


def read_only(monkeypatch, arguments):
    """Lets a script read these arguments, and stops it there."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, given=None, namespace=None):
        parse(parser, given, namespace)
        raise Parsed

    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def check_step(arguments):
    """What `FILE.py:FUNCTION` names is there."""
    for file, function in re.findall(r"(\S+\.py):(\w+)", " ".join(arguments)):
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.M)


def check_module(monkeypatch, module, *arguments):
    """A `python -m`: of pytest or of jaxmp, or without arguments."""
    if module == "pytest":
        files = [a for a in arguments if a.startswith("tests/")]
        assert files
        assert all((ROOT / file).exists() for file in files)
    elif module == "jaxmp":
        from jaxmp.cli import main

        check_step(arguments)
        read_only(monkeypatch, ["jaxmp", *arguments])
        with pytest.raises(Parsed):
            main()
    else:
        assert not arguments
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()


def check_script(monkeypatch, script, *arguments):
    """A script of `examples`: it takes the arguments, or has no flags at all."""
    path = ROOT / script
    assert path in SCRIPTS
    if "argparse" not in path.read_text():
        assert not arguments
        return
    monkeypatch.syspath_prepend(path.parent)
    module = importlib.import_module(path.stem)
    is_training = hasattr(module, "EXPERIMENT")
    main = partial(module.run, module.EXPERIMENT) if is_training else module.main
    read_only(monkeypatch, [script, *arguments])
    with pytest.raises(Parsed):
        main()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_and_takes_its_arguments(command, monkeypatch):
    first, *rest = shlex.split(command)
    if first == "-m":
        check_module(monkeypatch, *rest)
    else:
        check_script(monkeypatch, first, *rest)


def test_a_wrong_flag_is_noticed(monkeypatch):
    with pytest.raises(SystemExit):
        check_script(monkeypatch, "examples/benchmarks/trace_time.py", "--round", "x")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_named(script):
    assert str(script.relative_to(ROOT)) in PAGE


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_page_with_figures_is_listed(page):
    text = page.read_text()
    plots = re.findall(r"!\[[^\]]*\]\((?:\S*/)?(\w+\.svg)\)", text)
    assert all(plot in PAGE for plot in plots)
    if plots or SAYS_WHAT_PRINTS_IT.search(text):
        assert f"]({page.name})" in PAGE


@pytest.mark.parametrize("plot", [p.name for p in (ROOT / "docs").glob("*.svg")])
def test_every_plot_is_drawn_by_a_command(plot):
    assert plot in PAGE
