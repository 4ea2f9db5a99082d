"""What the benchmarks write into a page of the documentation."""

import pathlib
import re

from jaxmp._views.tables import markdown_table

__all__ = ["GIB", "MIB", "markdown_table", "write_section"]

GIB = 2.0**30
MIB = 2.0**20


def write_section(path: str | pathlib.Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- end of NAME -->`."""
    page = pathlib.Path(path)
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    section = f"{begin}\n{text.strip()}\n{end}"
    new, count = pattern.subn(lambda _: section, page.read_text())
    if count != 1:
        raise ValueError(
            f"{path} has {count} sections {begin} ... {end}; it needs one."
        )
    page.write_text(new)
