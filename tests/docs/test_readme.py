"""The README: two commands, six changed lines, and links that lead somewhere."""

import pathlib
import re

import numpy as np
import pytest

import jaxmp

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q "


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def side(diff, sign):
    lines = [line[1:] for line in diff.splitlines() if line[:1] in (sign, " ")]
    return "\n".join(lines) + "\n"


def run(source):
    namespace = {}
    exec(source, namespace)
    return namespace


def training():
    """The block with the training step."""
    return next(block for block in blocks("python") if "TrainState.create" in block)


def test_there_are_two_commands_one_line_each():
    assert blocks("bash") == [
        SET_UP + '".[examples]" && .venv/bin/python examples/train_lm.py\n',
        SET_UP + '-e ".[test]" && .venv/bin/python -m pytest\n',
    ]


def test_at_most_six_lines_change():
    (diff,) = blocks("diff")
    added = [line for line in diff.splitlines() if line.startswith("+")]
    removed = [line for line in diff.splitlines() if line.startswith("-")]
    assert len(removed) <= len(added) <= 6


def test_both_sides_of_the_diff_train():
    (diff,) = blocks("diff")
    new = side(diff, "+")
    assert new == training()
    before, after = run(side(diff, "-")), run(new)
    np.testing.assert_allclose(before["loss"], after["loss"], rtol=1e-3)
    assert int(after["state"].step) == 1
    assert jaxmp.get_loss_scale(after["state"]) == 2.0**16


@pytest.mark.parametrize("name", ["mixed_bfloat16", "float32"])
def test_one_string_changes_the_precision(name):
    source = training()
    assert source.count('"mixed_float16"') == 1
    page = run(source.replace('"mixed_float16"', f'"{name}"'))
    assert int(page["state"].step) == 1
    assert jaxmp.get_loss_scale(page["state"]) == 1


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_somewhere(page):
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    for path, fragment in re.findall(r"\]\(([^):]*)#([^)]+)\)", prose):
        target = page.parent / path if path else page
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
        assert fragment in map(anchor, headings), f"{path}#{fragment}"
