"""A softmax whose gradient needs its half-precision result and nothing else.

The gradient of `p = exp(z - m) / sum(exp(z - m))` is `p * (dp - sum(p * dp))`. What JAX
keeps for it are the float32 exponentials and their sum. The result is there anyway, in
half, as an operand of the next matmul; so the scores before it need not be kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.types import Array, Atom, Var
from jaxmp.casting.plan.plan import EqnPlan
from jaxmp.casting.plan.states import FLOAT32

Reads = dict[Var, dict[np.dtype | None, None]]
"""The dtypes in which each value of an island is read outside it, in order."""

_MOVES = frozenset(("broadcast_in_dim", "reshape", "transpose", "copy"))


class Softmax(NamedTuple):
    """The equations of a softmax inside an island.

    Attributes:
      members: plans of `sub`, `exp`, `reduce_sum`, movements of the sum, and `div`.
      scores: the variable `z`.
      shift: `m`, a variable or literal that is constant along the axes.
      axes: what is summed over.
      result: the variable `p`.
      rounds_scores: whether `z` and `m` are rounded to the half dtype of the result, as
        they were before they were scaled and masked: less has to be read and written.
      keeps_scores: whether XLA may keep these for the gradient, and not the result.
    """

    members: tuple[Any, ...]
    scores: Any
    shift: Any
    axes: tuple[int, ...]
    result: Any
    rounds_scores: bool = False
    keeps_scores: bool = False


def find_softmaxes(
    members: Sequence[EqnPlan], readers: dict[Var, list[EqnPlan]], reads: Reads
) -> list[Softmax]:
    """Finds the softmaxes among the members of an island.

    Args:
      members: plans of its equations.
      readers: the members that read each variable.
      reads: the dtypes in which each variable is read from outside the island.
    """
    producer = {v: plan for plan in members for v in plan.eqn.outvars}
    found = (_softmax(plan, producer, readers, reads) for plan in members)
    return [softmax for softmax in found if softmax is not None]


def _softmax(
    div: EqnPlan,
    producer: dict[Var, EqnPlan],
    readers: dict[Var, list[EqnPlan]],
    reads: Reads,
) -> Softmax | None:
    if div.eqn.primitive.name != "div" or any(map(is_literal, div.eqn.invars)):
        return None
    above, below = div.eqn.invars
    chain = [div]
    while below in producer and producer[below].eqn.primitive.name in _MOVES:
        chain.append(producer[below])
        below = chain[-1].eqn.invars[0]
    total, exp = producer.get(below), producer.get(above)
    if total is None or exp is None:
        return None
    if total.eqn.primitive.name != "reduce_sum" or total.eqn.invars[0] is not above:
        return None
    sub = producer.get(exp.eqn.invars[0])
    if exp.eqn.primitive.name != "exp" or sub is None:
        return None
    axes = tuple(int(axis) for axis in total.eqn.params["axes"])
    members = (sub, exp, total, *reversed(chain))
    if sub.eqn.primitive.name != "sub" or not _is_closed(members, readers, reads):
        return None
    scores, shift = sub.eqn.invars
    if is_literal(scores) or not _is_constant_along(shift, scores, axes):
        return None
    if not _lines_up(chain[:0:-1], axes):
        return None
    if set(reads.get(div.eqn.outvars[0], ())) - set(_tree.HALF):
        return None
    return Softmax(members, scores, shift, axes, div.eqn.outvars[0])


def _is_closed(
    members: Sequence[EqnPlan], readers: dict[Var, list[EqnPlan]], reads: Reads
) -> bool:
    """Nobody else reads what the softmax computes on the way."""
    inside = set(map(id, members))
    return all(
        v not in reads and all(id(reader) in inside for reader in readers.get(v, ()))
        for plan in members[:-1]
        for v in plan.eqn.outvars
    )


def _is_constant_along(shift: Atom, scores: Var, axes: tuple[int, ...]) -> bool:
    if is_literal(shift) or not shift.aval.shape:
        return True
    return shift.aval.ndim == scores.aval.ndim and all(
        shift.aval.shape[axis] == 1 for axis in axes
    )


def _lines_up(moves: Sequence[EqnPlan], axes: tuple[int, ...]) -> bool:
    """The sum comes back to where it was summed: one movement, which keeps the axes."""
    if len(moves) != 1 or moves[0].eqn.primitive.name != "broadcast_in_dim":
        return False
    move = moves[0].eqn
    kept = [i for i in range(move.outvars[0].aval.ndim) if i not in axes]
    return list(map(int, move.params["broadcast_dimensions"])) == kept


def run_softmax(
    softmax: Softmax, bind: Any, scores: Any, shift: Any, dtype: Any
) -> Any:
    """Runs the equations of a softmax, with the gradient that needs its result only.

    Args:
      softmax: what was found.
      bind: `bind(members, values) -> p`, which runs the equations themselves.
      scores: float32 array `z`.
      shift: array `m`; no gradient flows to it, as none would in sum.
      dtype: the half dtype of the result.

    Returns:
      `p` in `dtype`.
    """
    shift = jax.lax.stop_gradient(shift)

    @jax.custom_jvp
    def softmax_of(z: Array, m: Array) -> Array:
        if softmax.rounds_scores:
            z, m = _rounded(z, dtype), _rounded(m, dtype)
        return bind(softmax, z, m).astype(dtype)

    @softmax_of.defjvp
    def _(primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
        p = softmax_of(*primals)
        kept = _keep(softmax, p).astype(FLOAT32)
        dz = tangents[0]
        # Rounded, they do not sum to 1; where one is nearly 1 that error would be all.
        ones = jnp.sum(kept, axis=softmax.axes, keepdims=True)
        mean = jnp.sum(kept * dz, axis=softmax.axes, keepdims=True) / ones
        return p, (kept * (dz - mean)).astype(dtype)

    return softmax_of(scores, shift)


def _keep(softmax: Softmax, p: Any) -> Any:
    """The result, held so that XLA keeps it and not what it was rounded from.

    For TPUs XLA would keep the half result of the matmul before, if there is only
    arithmetic between: as small, and the softmax need not be written at all. For
    GPUs it would keep float32 exponentials.
    """
    hold = jax.lax.optimization_barrier
    if not softmax.keeps_scores:
        return hold(p)
    return jax.lax.platform_dependent(p, tpu=_as_it_is, default=hold)


def _as_it_is(x: Any) -> Any:
    return x


def _rounded(x: Any, dtype: Any) -> Any:
    """Rounds float32 values to half; what masks leave out must not become -inf.

    A cast there and back may be folded away for one operand of the softmax and not for
    the other, which would then be further apart than they are.
    """
    info = jnp.finfo(dtype)
    x = jnp.clip(x, -float(info.max), float(info.max))
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)
