"""The smallest set of kept units that is good enough, in few evaluations."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

from jaxmp.numerics.search._units import Unit

Units: TypeAlias = tuple[Unit, ...]
IsGood: TypeAlias = Callable[[Units], bool]


def minimise(ranked: Units, is_good: IsGood) -> Iterator[Units]:
    """Yields ever smaller sets that are good enough; nothing if not even all are.

    From the last one no member can be left out.

    Args:
      ranked: all units, those that matter most first.
      is_good: whether a set is; supersets of a good set are taken to be good.
    """
    if is_good(()):
        yield ()
        return
    if not is_good(ranked):
        return
    yield ranked
    low, high = 0, len(ranked)
    while high - low > 1:
        middle = (low + high) // 2
        if is_good(ranked[:middle]):
            high = middle
            yield ranked[:high]
        else:
            low = middle
    # Its last member is needed: without it the prefix is not good.
    yield from _leave_out(ranked[:high], ranked[: high - 1], is_good)


def _leave_out(kept: Units, group: Units, is_good: IsGood) -> Iterator[Units]:
    """Leaves a group out, or what of it can be, by halves, the last ranked first."""
    if not group:
        return
    without = tuple(unit for unit in kept if unit not in group)
    if is_good(without):
        yield without
        return
    if len(group) == 1:
        return
    middle = len(group) // 2
    for part in (group[middle:], group[:middle]):
        for smaller in _leave_out(kept, part, is_good):
            kept = smaller
            yield kept
