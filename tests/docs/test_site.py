"""The site: its front page, its reference, and what has to be listed by hand."""

import re
from pathlib import Path

import numpy as np
import pytest

import jaxmp

DOCS = Path(__file__).parents[2] / "docs"
FRONT = (DOCS / "index.md").read_text()


def blocks(text, language):
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```", text, re.M | re.S)


# The front page


def side(sign):
    """One side of the diff, as source."""
    (diff,) = blocks(FRONT, "diff")
    lines = [line[1:] for line in diff.splitlines() if line[:1] in (sign, " ")]
    return "\n".join(lines) + "\n"


def losses(sign):
    """Trains for three steps of one side of the diff, on the model of the page."""
    page = {}
    exec(blocks(FRONT, "python")[0].split("for _ in range")[0], page)
    exec(side(sign), page)
    params, opt_state = page["params"], page["tx"].init(page["params"])
    found = []
    for _ in range(3):
        params, opt_state, loss = page["train_step"](
            params, opt_state, page["x"], page["y"]
        )
        found.append(loss)
    return found


def test_both_sides_of_the_diff_train_alike():
    np.testing.assert_allclose(losses("-"), losses("+"), rtol=1e-2)


def test_the_program_has_the_new_side_of_the_diff():
    program = blocks(FRONT, "python")[0].splitlines()
    for line in side("+").splitlines():
        assert line.split("  # ")[0] in program


# What is listed by hand


def test_the_reference_has_every_name_of_the_index():
    reference = set()
    for page in (DOCS / "reference").glob("*.md"):
        reference |= set(re.findall(r"^   (jaxmp[\w.]*)$", page.read_text(), re.M))
    index = re.findall(r"^\| `(jaxmp[\w.]*)", (DOCS / "api.md").read_text(), re.M)
    assert sorted(reference) == sorted(index)


@pytest.mark.parametrize(
    "path",
    [page for page in sorted(DOCS.glob("**/*.md")) if page.stem != "index"],
    ids=lambda path: path.stem,
)
def test_every_page_is_in_the_contents(path):
    name = str(path.relative_to(DOCS).with_suffix(""))
    pages = [page.read_text() for page in (DOCS / "index.md", *DOCS.glob("*.md"))]
    listed = "\n".join(text for page in pages for text in blocks(page, "{toctree}"))
    entries = re.sub(r"^.* <(.*)>$", r"\1", listed, flags=re.M)
    assert name in entries.splitlines()


def test_the_citation_has_the_version():
    assert f"\nversion: {jaxmp.__version__}\n" in (DOCS / "CITATION.cff").read_text()


def test_the_changelog_has_the_version():
    assert f"\n## {jaxmp.__version__} - 20" in (DOCS / "CHANGELOG.md").read_text()
