"""How a program computes its values from one of them: by updating it, or anew.

`a * old + increment` updates `old`: the result is `old` with something added to it,
whatever `a` is. A matmul of it, an activation or an integer is computed anew. A norm,
which divides by a statistic of what it norms, updates too, and forgets the scale.
What an unknown primitive does with an operand like its result is not known: it may hand
it on, and counts as doing so.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.calls import loop
from jaxmp._jaxpr.primitives import (
    ADDS,
    CAST,
    LAYOUT,
    LINEAR,
    MATMULS,
    REDUCES,
    SUMS_INTO,
)
from jaxmp._jaxpr.types import Atom, Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.ops import _registry


class Use(NamedTuple):
    """How a value depends on an old one.

    Attributes:
      is_update: it is `a * old + increment`, else it is only computed from the old one.
      is_scaled: `a` is not 1, and no norm came after.
      is_normed: it was divided by a statistic of itself, so that scales mean nothing.
      is_statistic: it is computed from sums or extremes of the old value, elementwise.
      increments: how many there are.
      times: how often loops inside repeat the update; infinite if that is not known.
      through: how they depend on the old value: 0 not at all, 1 linearly, 2 else.
    """

    is_update: bool
    is_scaled: bool = False
    is_normed: bool = False
    is_statistic: bool = False
    increments: int = 0
    times: float = 1
    through: int = 0


OLD = Use(is_update=True)
Uses = dict[Any, Use | None]


def uses_of(jaxpr: Jaxpr, inputs: Sequence[Use | None]) -> Uses:
    """How the values of a jaxpr depend on an old one, given how its inputs do."""
    uses: Uses = dict(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        operands = [_use(uses, v) for v in eqn.invars]
        if any(operands):
            uses.update(zip(eqn.outvars, _results(eqn, operands), strict=True))
    return uses


def outputs(jaxpr: Jaxpr, inputs: Sequence[Use | None]) -> list[Use | None]:
    """The same for the outputs of a jaxpr."""
    uses = uses_of(jaxpr, inputs)
    return [_use(uses, v) for v in jaxpr.outvars]


def path(jaxpr: Jaxpr, inputs: Sequence[Use | None], out: int) -> Iterator[Any]:
    """The equations between the old value and an output, those in calls included.

    Only those that update it, the last one first.
    """
    yield from _path(jaxpr, inputs, {out})


def _path(jaxpr: Jaxpr, inputs: Sequence[Use | None], outs: set[int]) -> Iterator[Any]:
    uses = uses_of(jaxpr, inputs)
    on_path = {jaxpr.outvars[i] for i in outs if not is_literal(jaxpr.outvars[i])}
    for eqn in reversed(jaxpr.eqns):
        made = {
            i for i, v in enumerate(eqn.outvars) if v in on_path and _updates(uses, v)
        }
        if not made:
            continue
        on_path |= {v for v in eqn.invars if _updates(uses, v)}
        entering = _bodies(eqn, [_use(uses, v) for v in eqn.invars])
        for body, operands in entering:
            yield from _path(open_jaxpr(body), operands, made)
        if not entering:
            yield eqn


def _updates(uses: Uses, atom: Atom) -> bool:
    use = _use(uses, atom)
    return use is not None and use.is_update


def _use(uses: Uses, atom: Atom) -> Use | None:
    return None if is_literal(atom) else uses.get(atom)


def _results(eqn: Eqn, operands: list[Use | None]) -> Sequence[Use | None]:
    bodies = _bodies(eqn, operands)
    if not bodies and _registry.is_unknown(eqn.primitive.name):
        return [_handed_on(eqn, operands, v) for v in eqn.outvars]
    if not bodies:
        return [_result(eqn, operands)] * len(eqn.outvars)
    each = [outputs(open_jaxpr(body), entering) for body, entering in bodies]
    results = [_either(uses) for uses in zip(*each, strict=True)]
    if not _registry.call_rule(eqn.primitive.name).is_loop:
        return results
    read = loop(eqn)
    length = math.inf if read.length is None else read.length
    repeated = [_repeated(use, length) for use in results[: read.carries]]
    return repeated + results[read.carries :]


def _repeated(use: Use | None, length: float) -> Use | None:
    if use is None or not use.is_update:
        return use
    return use._replace(times=use.times * length)


def _bodies(eqn: Eqn, operands: list[Use | None]) -> list[tuple[Any, list[Use | None]]]:
    """The bodies of a call that return its results, with what enters them.

    A loop's carry enters as it does after the first iteration.
    """
    name, call = eqn.primitive.name, _registry.call_rule(eqn.primitive.name)
    if call is None:
        return []
    if name == "cond":
        return [(body, operands[1:]) for body in call.bodies(eqn)]
    if not call.is_loop:
        return [(call.bodies(eqn)[-1], operands)]
    read = loop(eqn)
    _, consts, carries, slices = read.split(operands)
    first = outputs(open_jaxpr(read.body), [*consts, *carries, *slices])
    again = [_either(uses) for uses in zip(carries, first[: read.carries], strict=True)]
    return [(read.body, [*consts, *again, *slices])]


def _either(uses: Sequence[Use | None]) -> Use | None:
    """One value or another, as of `where(done, old, new)`."""
    known = [use for use in uses if use is not None]
    if not known:
        return None
    kept = [use for use in known if use.is_update]
    return Use(
        is_update=bool(kept),
        is_scaled=any(use.is_scaled for use in kept),
        is_normed=bool(kept) and all(use.is_normed for use in kept),
        is_statistic=all(use.is_statistic for use in known),
        increments=max((use.increments for use in kept), default=0),
        times=max((use.times for use in kept), default=1),
        through=max(use.through for use in known),
    )


def _handed_on(eqn: Eqn, operands: list[Use | None], result: Any) -> Use:
    """What an unknown primitive returns: one of the operands like it, or anything."""
    alike = [
        use for v, use in zip(eqn.invars, operands, strict=True) if is_like(v, result)
    ]
    handed_on = _either(alike)
    if handed_on is not None and handed_on.is_update:
        return handed_on
    return Use(is_update=False, through=2)


def is_like(atom: Atom, result: Any) -> bool:
    """Whether two values have one shape and dtype."""
    kinds = [
        (getattr(v.aval, "shape", None), getattr(v.aval, "dtype", None))
        for v in (atom, result)
    ]
    return kinds[0] == kinds[1]


def _result(eqn: Eqn, operands: list[Use | None]) -> Use:
    name = eqn.primitive.name
    known = [use for use in operands if use is not None]
    kept = [use for use in known if use.is_update]
    if name in ADDS or name in SUMS_INTO:
        into_other = name in SUMS_INTO and operands[0] not in kept
        if kept and not into_other:
            return _sum(eqn, operands, kept)
    is_factor = name == "mul" or (name == "div" and operands[0] in kept)
    if is_factor and any(is_literal(v) and np.all(v.val == 1) for v in eqn.invars):
        return known[0]
    if is_factor and len(kept) == 1:
        return _product(kept[0], [use for use in known if not use.is_update])
    if name == "select_n":
        return _either(operands[1:]) or Use(False, through=2)
    if name == "neg" and kept:
        return kept[0]._replace(is_scaled=not kept[0].is_normed)
    if moves(eqn) and kept and eqn.outvars[0].aval.size == eqn.invars[0].aval.size:
        return kept[0]
    through = max(max(use.through, 0 if use.is_update else 1) for use in known)
    is_statistic = all(use.is_statistic for use in known) and name not in MATMULS
    return Use(
        is_update=False,
        is_statistic=is_statistic or name in REDUCES,
        through=max(through, 1) if _is_linear(name, operands) else 2,
    )


def moves(eqn: Eqn) -> bool:
    """Whether an equation returns its operand in another shape, order or dtype."""
    name = eqn.primitive.name
    return name in LAYOUT or name == CAST


def may_hand_on(eqn: Eqn) -> bool:
    """The same, and for all that is known, what an unknown primitive returns."""
    return moves(eqn) or _registry.is_unknown(eqn.primitive.name)


def _sum(eqn: Eqn, operands: list[Use | None], kept: list[Use]) -> Use:
    others = [u for u in operands if u is None or not (u.is_update or u.is_statistic)]
    is_scaled = len(kept) > 1 or any(use.is_scaled for use in kept)
    if eqn.primitive.name == "sub" and operands[0] not in kept:
        is_scaled = True
    is_normed = all(use.is_normed for use in kept)
    through = [max(use.through, 1) for use in others if use is not None]
    return Use(
        is_update=True,
        is_scaled=is_scaled and not is_normed,
        is_normed=is_normed,
        increments=max(use.increments for use in kept) + 1,
        times=max(use.times for use in kept),
        through=max([use.through for use in kept] + through),
    )


def _product(kept: Use, factors: list[Use]) -> Use:
    if factors and all(use.is_statistic for use in factors):
        return kept._replace(is_scaled=False, is_normed=True)
    through = 2 if factors else kept.through
    return kept._replace(is_scaled=not kept.is_normed, through=through)


def _is_linear(name: str, operands: list[Use | None]) -> bool:
    count = sum(use is not None for use in operands)
    if name in ("mul", "div"):
        return count == 1 and (name == "mul" or operands[0] is not None)
    if name in ADDS or name in SUMS_INTO or name in LINEAR:
        return True
    return name in MATMULS and count == 1
