"""Where an operation stands: its module path, the user's line, its direction."""

import functools
from typing import Any

from jaxmp._jaxpr.marks import MARKS
from jaxmp._jaxpr.scopes import is_backward, normalise
from jaxmp._jaxpr.sources import Source, is_users, written

_OWN_SCOPES = frozenset((*MARKS, "checkpoint", "rematted_computation"))
_CHECKPOINTS = ("remat2", "checkpoint", "remat")


class Site:
    """An equation at one place of a program; a loop's iterations share it.

    Attributes:
      eqn: the equation of the jaxpr.
      parent: the call or loop that it is in, or None.
      needed: which of its results the value of the function needs.
      is_later: whether only gradients need it.
    """

    def __init__(
        self,
        eqn: Any,
        parent: "Site | None",
        needed: tuple[bool, ...],
        is_later: bool,
    ):
        self.eqn = eqn
        self.parent = parent
        self.needed = needed
        self.is_later = is_later or (parent is not None and parent.is_later)

    @property
    def primitive(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

    @functools.cached_property
    def scopes(self) -> tuple[str, ...]:
        """Name scopes and modules around it, outermost first."""
        stack = self.eqn.source_info.name_stack.stack
        names = (part.name for part in stack if type(part).__name__ == "Scope")
        own = normalise(tuple(name for name in names if name not in _OWN_SCOPES))
        if self.parent is None:
            return own
        around = self.parent.scopes
        # The backward pass of `jax.checkpoint` repeats the scopes around it inside.
        is_repeated = self.parent.primitive in _CHECKPOINTS
        if is_repeated and own[: len(around)] == around:
            return own
        return around + own

    @property
    def path(self) -> str:
        """The scopes as in `"Decoder/block_0/attention"`, as rules read them."""
        return "/".join(self.scopes)

    @functools.cached_property
    def is_backward(self) -> bool:
        """Whether it is part of a backward pass, also of one inside the function."""
        inherited = self.parent is not None and self.parent.is_backward
        return self.is_later or inherited or is_backward(self.eqn)

    @property
    def library(self) -> str | None:
        """The library that called JAX here, None for the user's own code."""
        found = written(self.eqn.source_info.traceback)
        if found.caller or self.parent is None:
            return found.library
        return self.parent.library

    @property
    def packages(self) -> frozenset[str]:
        """Every library on the stack, of the calls around it as well."""
        around = frozenset() if self.parent is None else self.parent.packages
        return written(self.eqn.source_info.traceback).packages | around

    @property
    def derivatives(self) -> int:
        """How many derivatives it is inside of: 2 in a `jax.jvp` of a `jax.grad`."""
        stack = self.eqn.source_info.name_stack.stack
        own = sum(
            type(part).__name__ == "Transform" and part.name == "jvp" for part in stack
        )
        return max(own, 0 if self.parent is None else self.parent.derivatives)

    @functools.cached_property
    def line(self) -> Source | None:
        """The user's line: the innermost one outside of libraries, if there is one."""
        found = written(self.eqn.source_info.traceback)
        if found.source is not None:
            return found.source
        inherited = None if self.parent is None else self.parent.line
        if inherited is None or not is_users(inherited.file):
            return found.nearest or inherited
        return inherited
