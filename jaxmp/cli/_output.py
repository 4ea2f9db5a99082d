"""What a command returns."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Output(NamedTuple):
    """The result of a command, in every form.

    Attributes:
      text: for a terminal.
      data: for `--json`; dicts, lists, strings and numbers.
      to_html: for `--html`; writes a self-contained page into a file.
      kinds: the kinds of what was found, for `--fail-on`.
    """

    text: str
    data: Any
    to_html: Callable[[str], None]
    kinds: frozenset[str] = frozenset()
