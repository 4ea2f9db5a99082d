"""The page that follows a block through autocast shows what autocast does today."""

import inspect
import pathlib
import re

import how_autocast_works
import jax
import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "how_autocast_works.md"
TEXT = PAGE.read_text()
JAX_OF_PAGE = re.search(r"on JAX ([\d.]*\d)", TEXT)[1]
LISTINGS = how_autocast_works.listings()


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_is_what_the_code_gives(name):
    if jax.__version__ == JAX_OF_PAGE:
        section = f"<!-- {name} -->\n{LISTINGS[name]}\n<!-- end of {name} -->"
        assert section in TEXT, "run examples/how_autocast_works.py --write"


def test_every_release_of_jax_shows_half_matmuls_and_three_islands():
    matmuls = [row for row in rows("decisions") if "dot_general" in row]
    assert len(matmuls) == 8
    assert all(re.search("compute  bf16  low ", row) for row in matmuls)
    assert [row.split("  ")[-1].strip() for row in rows("islands")[1:]] == [
        "repeats it from its inputs",
        "needs none of it",
        "keeps the half result alone",
    ]


def rows(name):
    return LISTINGS[name].splitlines()[1:-1]


def test_the_page_shows_the_function_that_is_followed():
    assert inspect.getsource(how_autocast_works.attention) in TEXT
