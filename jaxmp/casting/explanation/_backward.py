"""What the backward pass of float32 islands keeps, and what it computes again."""

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxmp._jaxpr.site import Site
from jaxmp.casting.islands._islands import Island
from jaxmp.casting.islands._residuals import residuals_of
from jaxmp.casting.plan.plan import EqnPlan


class Backward(NamedTuple):
    """Islands whose backward pass computes something again, all alike.

    Attributes:
      kept: the operations whose results are kept besides the half inputs of an island.
      numbers: how many numbers these are, such as `"2 x 64"`.
      again: the operations that are computed again, as large as the inputs.
      islands: how many of them there are.
      source: file, line and function of what is computed again in the first of them.
    """

    kept: tuple[str, ...]
    numbers: str
    again: tuple[str, ...]
    islands: int
    source: str

    def __str__(self) -> str:
        kept = f"{', '.join(self.kept)}, {self.numbers} numbers" if self.kept else ""
        count = f"{self.islands} island{'s' if self.islands > 1 else ''}"
        where = f", at {self.source}" if self.source else ""
        return (
            f"backward pass of {count}{where}: kept: {kept or 'half inputs only'}; "
            f"computed again: {', '.join(self.again)}"
        )


def backward_of(islands: Iterable[Island]) -> tuple[Backward, ...]:
    """What is kept and computed again; islands that do the same are one of these."""
    found: dict[tuple[tuple[str, ...], str, tuple[str, ...]], list[str]] = {}
    for island in islands:
        if not island.recompute:
            continue
        kept, again = residuals_of(island.members, island.inputs)
        if again:
            key = (_names(kept), _numbers(kept), _names(again))
            source = str(Site(again[0].eqn, None).line or "")
            found.setdefault(key, []).append(source)
    return tuple(Backward(*key, len(at), at[0]) for key, at in found.items())


def _names(plans: Sequence[EqnPlan]) -> tuple[str, ...]:
    return tuple(plan.eqn.primitive.name for plan in plans)


def _numbers(plans: Sequence[EqnPlan]) -> str:
    sizes = collections.Counter(v.aval.size for p in plans for v in p.eqn.outvars)
    return " + ".join(f"{count} x {size}" for size, count in sizes.items())
