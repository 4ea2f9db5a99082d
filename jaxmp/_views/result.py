"""`Result`: what every result can do: rows, JSON, a page, and a table to print."""

import abc
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any


class Result(abc.ABC):
    """The base of what jaxmp finds out; `print` of it is a table.

    A class gives `to_rows`, `_page` and `__str__`. One that has more to say in JSON
    than its rows gives `_contents` too, and one with colours `__rich__`.
    """

    @abc.abstractmethod
    def to_rows(self) -> list[dict[str, Any]]:
        """Gives everything as flat dictionaries, for a data frame or a log."""

    @abc.abstractmethod
    def _page(self) -> str:
        """The whole page that `to_html` writes."""

    def _contents(self) -> Any:
        """What `to_json` writes."""
        return self.to_rows()

    def to_json(self) -> str:
        """Gives everything as JSON; what is not finite is null."""
        return json.dumps(plain(self._contents()), indent=1)

    def to_html(self, path: Any) -> None:
        """Writes one self-contained page.

        Args:
          path: file to write.
        """
        Path(path).write_text(self._page(), encoding="utf-8")

    def show(self) -> None:
        """Prints it: with colours in a terminal that can show them, plain in a pipe."""
        if sys.stdout.isatty() and hasattr(self, "__rich__"):
            import rich

            rich.print(self)
        else:
            print(self)


def plain(value: Any) -> Any:
    """A value as JSON writes it: records as dictionaries, tuples as lists.

    Dtypes and what else JSON does not know become strings, and numbers that are not
    finite None.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if dataclasses.is_dataclass(value):
        return {
            f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(x) for x in value]
    return str(value)
