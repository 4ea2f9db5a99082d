"""`Site`: where an equation stands: its modules, the user's line, its direction."""

import functools

from jaxmp._jaxpr.calls import CHECKPOINTS
from jaxmp._jaxpr.marks import MARKS
from jaxmp._jaxpr.scopes import count_derivatives, is_backward, name_scopes
from jaxmp._jaxpr.sources import Source, Written, written
from jaxmp._jaxpr.types import Eqn

_OWN_SCOPES = frozenset((*MARKS, "checkpoint", "rematted_computation"))


class Site:
    """An equation at one place of a program; a loop's iterations share it.

    Attributes:
      eqn: the equation; None outside all of them.
      parent: the site of the call or loop that it is in, or None.
    """

    def __init__(self, eqn: Eqn = None, parent: "Site | None" = None):
        self.eqn = eqn
        self.parent = parent

    @property
    def primitive(self) -> str:
        """Name of the primitive; empty outside all of them."""
        return "" if self.eqn is None else self.eqn.primitive.name

    @functools.cached_property
    def written(self) -> Written:
        """How the equation was written."""
        return written(None if self.eqn is None else self.eqn.source_info.traceback)

    @functools.cached_property
    def source(self) -> Source | None:
        """The user's line; for what JAX traced once for all, that of the call."""
        if self.written.source is not None or self.parent is None:
            return self.written.source
        return self.parent.source

    @functools.cached_property
    def line(self) -> Source | None:
        """The user's line, or the innermost one of a library if there is none."""
        if self.source is not None or self.written.nearest is not None:
            return self.source or self.written.nearest
        return None if self.parent is None else self.parent.line

    @property
    def call(self) -> tuple[Source | None, int]:
        """The call of JAX that made it, down to the instruction within a line."""
        if self.written.nearest is not None or self.parent is None:
            return self.written.nearest, self.written.instruction
        return self.parent.call

    @property
    def library(self) -> str | None:
        """The library that called JAX here, None for the user's own code."""
        if self.written.caller or self.parent is None:
            return self.written.library
        return self.parent.library

    @functools.cached_property
    def packages(self) -> frozenset[str]:
        """Every library on the stack, of the calls around it as well."""
        around = frozenset() if self.parent is None else self.parent.packages
        return self.written.packages | around

    @functools.cached_property
    def scopes(self) -> tuple[str, ...]:
        """Name scopes and modules around it, outermost first."""
        own = name_scopes(self.eqn, without=_OWN_SCOPES)
        if self.parent is None:
            return own
        around = self.parent.scopes
        # The backward pass of `jax.checkpoint` repeats the scopes around it inside.
        is_repeated = self.parent.primitive in CHECKPOINTS
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
        return inherited or is_backward(self.eqn)

    @property
    def derivatives(self) -> int:
        """How many derivatives it is inside: 2 in a `jax.jvp` of a `jax.grad`."""
        around = 0 if self.parent is None else self.parent.derivatives
        return max(count_derivatives(self.eqn), around)
