"""`explain`: what autocast decides about a function, op by op, and why."""

import collections
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.arguments import flatten_arguments
from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.marks import scopes
from jaxmp._jaxpr.residuals import residual_jaxpr
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.types import Atom
from jaxmp.casting._autocast import autocast
from jaxmp.casting.explanation._backward import backward_of
from jaxmp.casting.explanation._cancellation import NOTE, cancelling
from jaxmp.casting.explanation._result import Explanation, Row
from jaxmp.casting.explanation.shares import own_flops, shares_of
from jaxmp.casting.islands._islands import Island
from jaxmp.casting.kernels._interception import tracing
from jaxmp.casting.plan.plan import EqnPlan, JaxprPlan, Quantizing, bodies_of
from jaxmp.casting.planner._ambient_precision import without_ambient_precision
from jaxmp.casting.planner._whole_function import check_rules, plan_jaxpr, read_settings
from jaxmp.casting.quantized.formats import formats_of
from jaxmp.errors import NoBlocksWarning, NothingQuantizedWarning
from jaxmp.policy import PolicyLike

_SHORT = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float64": "f64",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
}


def explain(
    fn: Callable[..., Any],
    policy: PolicyLike = "mixed_bfloat16",
    *,
    rules: Sequence[Any] = (),
    half_residuals: bool = True,
) -> Callable[..., Explanation]:
    """Shows what `autocast(fn, policy)` decides; takes the same arguments.

    Args:
      fn: the function, not yet under autocast.
      policy: as for `autocast`.
      rules: as for `autocast`.
      half_residuals: as for `autocast`.

    Returns:
      A function of the arguments of `fn`, arrays or `jax.ShapeDtypeStruct`s, which
      returns an `Explanation`. Nothing is computed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmp
      >>> plan = jaxmp.explain(lambda w, x: jnp.exp(x @ w).sum())(
      ...     jnp.ones((4, 2)), jnp.ones((3, 4)))
      >>> [(row.operation, row.after) for row in plan.rows][:2]
      [('dot_general', 'bf16 bf16 -> bf16'), ('exp', 'f32 -> f32')]
      >>> plan.half_flops
      1.0
    """
    settings = read_settings(policy, rules, half_residuals)

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        args, kwargs = jax.tree.map(_concrete, (args, kwargs))
        arguments, arrays = flatten_arguments(fn, args, kwargs)
        with without_ambient_precision(), tracing(settings):
            jaxpr, _ = arguments.trace(fn, arrays, name_modules=True)
        plan, planner = plan_jaxpr(jaxpr, settings)
        check_rules(planner)
        noted = set().union(*(cancelling(p.jaxpr) for p in _plans(plan)))
        shares = shares_of(plan)
        steps = [step for p in _plans(plan) for step in p.steps]
        islands = [step for step in steps if isinstance(step, Island)]
        cast_fn = autocast(fn, policy, rules=rules, half_residuals=half_residuals)
        return Explanation(
            rows=tuple(_row(step, noted) for step in _walk(plan)),
            half_flops=shares.half / max(shares.total, 1),
            reasons=shares.reasons,
            matmul_flops=shares.total,
            wants_half=settings.compute_dtype in _tree.HALF,
            casts=sum(_casts(plan) for plan in _plans(plan)),
            islands=len(islands),
            backward=backward_of(islands),
            quantized=tuple(formats_of(plan)) if planner.matmuls else (),
            residual_bytes=_residual_bytes(cast_fn, args, kwargs),
        )

    return explained


def _concrete(x: Any) -> Any:
    # Stands in for an abstract array, which would count as a static argument.
    if isinstance(x, jax.ShapeDtypeStruct):
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)
    return x


class _Step(NamedTuple):
    """An equation of a plan: where it stands, and how often it runs."""

    plan: EqnPlan
    site: Site
    path: tuple[str, ...]
    times: int


def _walk(
    plan: JaxprPlan,
    path: tuple[str, ...] = (),
    times: int = 1,
    parent: Site | None = None,
) -> Iterator[_Step]:
    """The equations that have a floating operand or result, those in calls included."""
    for eqn in plan.eqns:
        atoms = (*eqn.eqn.invars, *eqn.eqn.outvars)
        step = _Step(eqn, Site(eqn.eqn, parent), path + scopes(eqn.eqn), times)
        if any(map(castable_dtype, atoms)):
            yield step
        count = times * eqn.eqn.params.get("length", 1)
        for body in bodies_of(eqn.call):
            yield from _walk(body, step.path, count, step.site)


def _plans(plan: JaxprPlan) -> Iterator[JaxprPlan]:
    yield plan
    for eqn in plan.eqns:
        for body in bodies_of(eqn.call):
            yield from _plans(body)


def _row(step: _Step, noted: set[int]) -> Row:
    plan, eqn = step.plan, step.plan.eqn
    note = f"; {NOTE}" if id(eqn) in noted else ""
    name = eqn.params.get("name")
    operation = f"{eqn.primitive.name} {name}" if name else eqn.primitive.name
    before = _dtypes(v.aval.dtype for v in filter(_is_float, eqn.invars))
    before += " -> " + _dtypes(v.aval.dtype for v in filter(_is_float, eqn.outvars))
    read = _formats(plan) or plan.in_dtypes
    after = _dtypes(
        dtype or v.aval.dtype
        for v, dtype in zip(eqn.invars, read, strict=True)
        if _is_float(v)
    )
    half, full = own_flops(plan, step.times)
    after += " -> " + _dtypes(
        v.aval.dtype if state is None else state.dtype
        for v, state in zip(eqn.outvars, plan.out_states, strict=True)
        if _is_float(v)
    )
    if plan.quantizing is not None:
        note = f"; {_multiplied(plan.quantizing)}{note}"
    return Row(
        operation=operation,
        source=str(step.site.line or ""),
        path="/".join(step.path),
        before=before.strip(),
        after=after.strip(),
        op_class=plan.op_class.value,
        reason=plan.reason + note,
        half_flops=half,
        full_flops=full,
        recipe=plan.recipe.name if plan.recipe else "",
    )


def _is_float(atom: Atom) -> bool:
    """Whether a value is in a floating dtype that is shown: float8 to float32."""
    dtype = getattr(atom.aval, "dtype", None)
    return castable_dtype(atom) is not None or getattr(dtype, "name", "") in _SHORT


def _formats(plan: EqnPlan) -> tuple[Any, ...]:
    """The formats in which the operands of a quantised matmul are multiplied."""
    if plan.quantizing is None or plan.recipe is None:
        return ()
    return tuple(map(plan.recipe.format_of, plan.quantizing.roles))


def _multiplied(quantizing: Quantizing) -> str:
    if quantizing.recipe is None:
        return f"left in half: {quantizing.reason}"
    return f"multiplied in {quantizing.reason}"


def _dtypes(dtypes: Iterable[Any]) -> str:
    names = [jnp.dtype(d).name for d in dtypes]
    return " ".join(_SHORT.get(name, name) for name in names)


def _casts(plan: JaxprPlan) -> int:
    """How many operands are read in another dtype than they are stored in."""
    states = dict(zip(plan.jaxpr.invars, plan.in_states, strict=True))
    count = 0
    for eqn in plan.eqns:
        for v, dtype in zip(eqn.eqn.invars, eqn.in_dtypes, strict=True):
            state = None if is_literal(v) else states.get(v)
            count += state is not None and dtype not in (None, state.dtype)
        states.update(zip(eqn.eqn.outvars, eqn.out_states, strict=True))
    return count


def _residual_bytes(fn: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, int]:
    with warnings.catch_warnings():
        # The explanation says it.
        warnings.simplefilter("ignore", NothingQuantizedWarning)
        warnings.simplefilter("ignore", NoBlocksWarning)
        jaxpr = residual_jaxpr(fn, args, kwargs)
    sizes = collections.Counter[str]()
    for x in () if jaxpr is None else jaxpr.out_avals:
        sizes[str(x.dtype)] += x.size * x.dtype.itemsize
    return dict(sizes)
