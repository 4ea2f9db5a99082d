"""`explain`: what autocast decides about a function, op by op, and why."""

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util

from jaxmp import _html, _table, _tree
from jaxmp._flops import MATMULS, matmul_shape
from jaxmp._residuals import residual_jaxpr
from jaxmp.casting._ambient import without_ambient_precision
from jaxmp.casting._arguments import flatten_arguments
from jaxmp.casting._autocast import autocast, check_rules, plan_jaxpr, read_settings
from jaxmp.casting._cancellation import NOTE, cancelling
from jaxmp.casting._islands import Island
from jaxmp.casting._plan import EqnPlan, JaxprPlan, scopes
from jaxmp.casting._states import castable_dtype, is_literal

_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
_COLUMNS = ("operation", "source", "path", "before", "after", "class", "reason")


class Row(NamedTuple):
    """One operation.

    Attributes:
      operation: name of the primitive, with the name of the function for a call.
      source: file, line and function of the user's code.
      path: name scopes and modules around it.
      before, after: dtypes of the operands and results, as in `"f32 f32 -> f32"`.
      op_class: `compute`, `full`, `follow` or `untouched`.
      reason: why.
    """

    operation: str
    source: str
    path: str
    before: str
    after: str
    op_class: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What autocast decides about one call of a function.

    Attributes:
      rows: one `Row` for each operation that has a floating operand or result.
      half_flops: share of the matmul FLOPs that run in half, between 0 and 1.
      casts: how many casts are inserted.
      islands: how many float32 islands there are.
      residual_bytes: what a backward pass keeps, in bytes by dtype; empty if the
        function cannot be differentiated in reverse.
    """

    rows: tuple[Row, ...]
    half_flops: float
    casts: int
    islands: int
    residual_bytes: dict[str, int]

    @property
    def summary(self) -> str:
        """The figures in one line."""
        kept = ", ".join(
            f"{size / 2**20:.1f} MiB {dtype}"
            for dtype, size in sorted(self.residual_bytes.items())
        )
        return (
            f"{self.half_flops:.0%} of the matmul FLOPs in half | {self.casts} casts | "
            f"{self.islands} float32 islands | kept for the backward pass: "
            f"{kept or 'nothing'}"
        )

    def __str__(self) -> str:
        return f"{_table.text_table(_COLUMNS, self.rows)}\n\n{self.summary}"

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(*_COLUMNS, caption=self.summary)
        for row in self.rows:
            table.add_row(*row, style=_STYLES[row.op_class])
        return table

    def show(self) -> None:
        """Prints the table: with colours in a terminal, plain in a pipe."""
        if sys.stdout.isatty():
            import rich

            rich.print(self)
        else:
            print(self)

    def to_html(self, path: Any) -> None:
        """Writes one self-contained page.

        Args:
          path: file to write.
        """
        kinds = [row.op_class for row in self.rows]
        page = _html.page(
            "What autocast decided",
            _html.paragraph(self.summary),
            _html.checkboxes(_MARKS),
            _html.table(
                _COLUMNS,
                self.rows,
                code=("operation", "before", "after"),
                styles=[_MARKS[kind] for kind in kinds],
                kinds=kinds,
            ),
        )
        with open(path, "w", encoding="utf-8") as file:
            file.write(page)


_STYLES = {"compute": "green", "full": "red", "follow": "", "untouched": "dim"}
_MARKS = {"compute": "good", "full": "bad", "follow": "note", "untouched": "quiet"}


def explain(
    fn: Callable[..., Any],
    policy: Any = "mixed_bfloat16",
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
      >>> told = jaxmp.explain(lambda w, x: jnp.exp(x @ w).sum())(
      ...     jnp.ones((4, 2)), jnp.ones((3, 4)))
      >>> [(row.operation, row.after) for row in told.rows][:2]
      [('dot_general', 'bf16 bf16 -> bf16'), ('exp', 'f32 -> f32')]
      >>> told.half_flops
      1.0
    """
    settings = read_settings(policy, rules, half_residuals)

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        args, kwargs = jax.tree.map(_concrete, (args, kwargs))
        arguments, arrays = flatten_arguments(fn, args, kwargs)
        with without_ambient_precision():
            jaxpr, _ = arguments.trace(fn, arrays, name_modules=True)
        plan, planner = plan_jaxpr(jaxpr, settings)
        check_rules(planner)
        told = list(_walk(plan, (), 1))
        noted = set().union(*(cancelling(p.jaxpr) for p in _plans(plan)))
        flops = collections.Counter[bool]()
        for eqn, _, times in told:
            if eqn.eqn.primitive.name in MATMULS:
                is_half = castable_dtype(eqn.eqn.invars[0]) and _half(eqn.in_dtypes[0])
                flops[bool(is_half)] += times * matmul_shape(eqn.eqn).flops
        cast_fn = autocast(fn, policy, rules=rules, half_residuals=half_residuals)
        return Explanation(
            rows=tuple(_row(eqn, path, noted) for eqn, path, _ in told),
            half_flops=flops[True] / max(sum(flops.values()), 1),
            casts=sum(_casts(plan) for plan in _plans(plan)),
            islands=sum(
                isinstance(step, Island) for p in _plans(plan) for step in p.steps
            ),
            residual_bytes=_residual_bytes(cast_fn, args, kwargs),
        )

    return explained


def _concrete(x: Any) -> Any:
    # An abstract array is a leaf that is no array: stand in an empty buffer for it.
    if isinstance(x, jax.ShapeDtypeStruct):
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)
    return x


def _walk(
    plan: JaxprPlan, path: tuple[str, ...], times: int
) -> Iterator[tuple[EqnPlan, tuple[str, ...], int]]:
    for eqn in plan.eqns:
        atoms = (*eqn.eqn.invars, *eqn.eqn.outvars)
        around = path + scopes(eqn.eqn)
        if any(map(castable_dtype, atoms)):
            yield eqn, around, times
        for body in _bodies(eqn.call):
            yield from _walk(body, around, times * eqn.eqn.params.get("length", 1))


def _bodies(call: Any) -> Sequence[JaxprPlan]:
    if call is None:
        return ()
    call = getattr(call, "primal", call)
    return call if isinstance(call, tuple) else (call,)


def _plans(plan: JaxprPlan) -> Iterator[JaxprPlan]:
    yield plan
    for eqn in plan.eqns:
        for body in _bodies(eqn.call):
            yield from _plans(body)


def _row(plan: EqnPlan, path: tuple[str, ...], noted: set[int]) -> Row:
    eqn = plan.eqn
    note = f"; {NOTE}" if id(eqn) in noted else ""
    name = eqn.params.get("name")
    operation = f"{eqn.primitive.name} {name}" if name else eqn.primitive.name
    before = _dtypes(v.aval.dtype for v in eqn.invars if castable_dtype(v))
    before += " -> " + _dtypes(v.aval.dtype for v in eqn.outvars if castable_dtype(v))
    after = _dtypes(
        dtype or v.aval.dtype
        for v, dtype in zip(eqn.invars, plan.in_dtypes, strict=True)
        if castable_dtype(v)
    )
    after += " -> " + _dtypes(s.dtype for s in plan.out_states if s is not None)
    source = source_info_util.summarize(eqn.source_info).rpartition("/")[-1]
    return Row(
        operation,
        source,
        "/".join(path),
        before.strip(),
        after.strip(),
        plan.op_class.value,
        plan.reason + note,
    )


def _dtypes(dtypes: Any) -> str:
    names = [jnp.dtype(d).name for d in dtypes]
    return " ".join(_SHORT.get(name, name) for name in names)


def _half(dtype: Any) -> bool:
    return dtype in _tree.HALF


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
    jaxpr = residual_jaxpr(fn, args, kwargs)
    sizes = collections.Counter[str]()
    for x in () if jaxpr is None else jaxpr.out_avals:
        sizes[str(x.dtype)] += x.size * x.dtype.itemsize
    return dict(sizes)
