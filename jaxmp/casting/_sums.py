"""Tells the carries of loops that are sums from those that are replaced.

A sum is updated as `a * old + increment`, with any `a`: linear attention, the delta
rule, integrators, state space models. Rounding it to half would lose the increments, so
it stays float32, and those who read it round their copy.

A residual stream, `x + f(x)` over the layers of a network, is a sum as well. It is told
apart by three properties: nothing scales what was there, `f` reads it through something
that is not linear, and there are fewer steps than it takes to lose a term.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxmp._jax_internals import open_jaxpr, scan_arity
from jaxmp.casting import _registry
from jaxmp.casting._states import is_literal

LAYERS = 256
"""Of so many equal terms, bfloat16 loses the next."""

_ADDS = frozenset(("add", "add_any", "sub"))
_SUMS_INTO = frozenset(("scatter-add", "scatter_add", "scatter-sub", "scatter_sub"))
_CONTRACTS = frozenset(("dot_general", "ragged_dot_general", "conv_general_dilated"))


class Use(NamedTuple):
    """How a value depends on a carry.

    Attributes:
      is_update: it is `a * old + increment`, else it is only computed from the carry.
      is_scaled: `a` is not 1.
      is_added: there is an increment.
      through: how the increment depends on the carry: 0 not at all, 1 linearly, 2 else.
    """

    is_update: bool
    is_scaled: bool = False
    is_added: bool = False
    through: int = 0


_CARRY = Use(is_update=True)
Uses = dict[Any, Use | None]


def is_sum(
    jaxpr: Any, index: int, out: int, length: int | None, in_backward: bool
) -> bool:
    """Whether a loop's body updates a carry as a sum.

    Args:
      jaxpr: the body.
      index: which of its inputs the carry is.
      out: which of its outputs the carry is.
      length: how often the loop runs, if that is known.
      in_backward: whether the loop is part of a backward pass, which is linear.
    """
    jaxpr = open_jaxpr(jaxpr)
    inputs: list[Use | None] = [None] * len(jaxpr.invars)
    inputs[index] = _CARRY
    use = _outputs(jaxpr, inputs)[out]
    if use is None or not use.is_update or not use.is_added:
        return False
    is_stream = not use.is_scaled and use.through >= (1 if in_backward else 2)
    return not is_stream or length is None or length >= LAYERS


def updates(jaxpr: Any, index: int, out: int) -> Iterator[int]:
    """The ids of the equations that update a carry, those in calls included."""
    jaxpr = open_jaxpr(jaxpr)
    inputs: list[Use | None] = [None] * len(jaxpr.invars)
    inputs[index] = _CARRY
    yield from _path(jaxpr, inputs, {out})


def _path(jaxpr: Any, inputs: Sequence[Use | None], outs: set[int]) -> Iterator[int]:
    uses = _uses(jaxpr, inputs)
    path = {jaxpr.outvars[i] for i in outs if not is_literal(jaxpr.outvars[i])}
    for eqn in reversed(jaxpr.eqns):
        made = {i for i, v in enumerate(eqn.outvars) if v in path and _updates(uses, v)}
        if not made:
            continue
        path |= {v for v in eqn.invars if not is_literal(v) and _updates(uses, v)}
        operands = [_use(uses, v) for v in eqn.invars]
        bodies = _bodies(eqn, operands)
        for body, entering in bodies:
            yield from _path(open_jaxpr(body), entering, made)
        if not bodies:
            yield id(eqn)


def _updates(uses: Uses, atom: Any) -> bool:
    use = _use(uses, atom)
    return use is not None and use.is_update


def _use(uses: Uses, atom: Any) -> Use | None:
    return None if is_literal(atom) else uses.get(atom)


def _outputs(jaxpr: Any, inputs: Sequence[Use | None]) -> list[Use | None]:
    uses = _uses(jaxpr, inputs)
    return [_use(uses, v) for v in jaxpr.outvars]


def _uses(jaxpr: Any, inputs: Sequence[Use | None]) -> Uses:
    uses: Uses = dict(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        operands = [_use(uses, v) for v in eqn.invars]
        if any(operands):
            uses.update(zip(eqn.outvars, _results(eqn, operands), strict=True))
    return uses


def _results(eqn: Any, operands: list[Use | None]) -> Sequence[Use | None]:
    bodies = _bodies(eqn, operands)
    if not bodies:
        return [_result(eqn, operands)] * len(eqn.outvars)
    each = [_outputs(open_jaxpr(body), entering) for body, entering in bodies]
    return [_either(uses) for uses in zip(*each, strict=True)]


def _bodies(eqn: Any, operands: list[Use | None]) -> list[tuple[Any, list[Use | None]]]:
    """The bodies of a call that return its results, with what enters them.

    A loop's carry enters as it does after the first iteration.
    """
    name, call = eqn.primitive.name, _registry.call_rule(eqn.primitive.name)
    if call is None:
        return []
    if name == "cond":
        return [(body, operands[1:]) for body in call.bodies(eqn)]
    body = call.bodies(eqn)[-1]
    if not call.is_loop:
        return [(body, operands)]
    if name == "while":
        operands = operands[eqn.params["cond_nconsts"] :]
        first, count = eqn.params["body_nconsts"], len(eqn.outvars)
    else:
        first, count = scan_arity(eqn.params)
    carry = slice(first, first + count)
    outs = _outputs(open_jaxpr(body), operands)[:count]
    again = [_either(uses) for uses in zip(operands[carry], outs, strict=True)]
    return [(body, [*operands[:first], *again, *operands[first + count :]])]


def _either(uses: Sequence[Use | None]) -> Use | None:
    """One value or another, as of `where(done, old, new)`."""
    known = [use for use in uses if use is not None]
    if not known:
        return None
    kept = [use for use in known if use.is_update]
    return Use(
        is_update=bool(kept),
        is_scaled=any(use.is_scaled for use in kept),
        is_added=any(use.is_added for use in kept),
        through=max(use.through for use in known),
    )


def _result(eqn: Any, operands: list[Use | None]) -> Use:
    name = eqn.primitive.name
    known = [use for use in operands if use is not None]
    kept = [use for use in known if use.is_update]
    through = max(max(use.through, 0 if use.is_update else 1) for use in known)
    if name in _ADDS or name in _SUMS_INTO:
        into_other = name in _SUMS_INTO and operands[0] not in kept
        if kept and not into_other:
            is_scaled = len(kept) > 1 or any(use.is_scaled for use in kept)
            is_scaled = is_scaled or (name == "sub" and operands[0] not in kept)
            return Use(True, is_scaled, True, through)
        return Use(False, through=max(through, 1))
    if name in ("mul", "div"):
        is_scale = len(kept) == 1 and (name == "mul" or operands[0] in kept)
        if is_scale:
            through = through if len(known) == 1 else 2
            return Use(True, True, kept[0].is_added, through)
        is_linear = len(known) == 1 and (name == "mul" or operands[0] is not None)
        return Use(False, through=max(through, 1) if is_linear else 2)
    if name == "select_n":
        return _either(operands[1:]) or Use(False, through=2)
    if name == "neg" and kept:
        return kept[0]._replace(is_scaled=True)
    is_moved = name in _registry.LAYOUT or name == "convert_element_type"
    if is_moved and kept and eqn.outvars[0].aval.size == eqn.invars[0].aval.size:
        return kept[0]
    if (name in _CONTRACTS and len(known) == 1) or name in _registry.LINEAR:
        return Use(False, through=max(through, 1))
    return Use(False, through=2)
