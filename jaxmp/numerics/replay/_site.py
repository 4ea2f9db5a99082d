"""`ReplaySite`: a site of a program that is run, and what its results are for."""

import functools
from typing import Any

from jaxmp._jaxpr.matmuls import QUANTIZE, is_quantize
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.types import Eqn


class ReplaySite(Site):
    """An equation at one place of a program that is run.

    Attributes:
      needed: which of its results the value of the function needs.
      is_later: whether only gradients need it.
    """

    def __init__(
        self,
        eqn: Eqn,
        parent: Site | None,
        needed: tuple[bool, ...],
        is_later: bool,
    ):
        super().__init__(eqn, parent)
        self.needed = needed
        inherited = isinstance(parent, ReplaySite) and parent.is_later
        self.is_later = is_later or inherited

    @property
    def primitive(self) -> str:
        """Name of the primitive; `"quantize"` for all that rounds to a small format."""
        return QUANTIZE if self._is_quantize else super().primitive

    @functools.cached_property
    def _is_quantize(self) -> bool:
        return self.eqn is not None and is_quantize(self.eqn)

    @functools.cached_property
    def is_backward(self) -> bool:
        """Whether it is part of a backward pass, or only gradients need it."""
        return self.is_later or super().is_backward

    def described(self) -> dict[str, Any]:
        """The columns of a table that say which operation it is, and where."""
        file, line, function = self.line or ("", 0, "")
        return {
            "operation": self.primitive,
            "file": file,
            "line": line,
            "function": function,
            "path": self.path,
        }
