"""The page that follows a block through autocast shows what autocast does today."""

import inspect
import pathlib

import how_autocast_works
import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "how_autocast_works.md"
TEXT = PAGE.read_text()
LISTINGS = how_autocast_works.listings()


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_is_what_the_code_gives(name):
    section = f"<!-- {name} -->\n{LISTINGS[name]}\n<!-- end of {name} -->"
    assert section in TEXT, "run examples/how_autocast_works.py --write"


def test_the_page_shows_the_function_that_is_followed():
    assert inspect.getsource(how_autocast_works.attention) in TEXT
