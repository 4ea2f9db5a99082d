"""The page on the design says which package may import which, as the tests hold it."""

import pathlib
import re

from tests.test_architecture import GROUND, MAY_IMPORT

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "design.md").read_text()
TABLE = {
    package: set(re.findall(r"`(\w+)`", others))
    for package, others in re.findall(r"^\| `(\w+)` \| .* \|(.*)\|$", PAGE, re.M)
}


def test_the_table_lists_what_each_package_may_import():
    packages = set(MAY_IMPORT) - {"__init__", "__main__"}
    assert {
        package: set() if package in GROUND else MAY_IMPORT[package] - GROUND
        for package in packages
    } == TABLE
