"""A part of a program that is planned by itself, for those that call parts of one.

`apply_policy` runs the code of a user's layer in a region: it is traced as it was
written, and planned as `autocast` would plan it. Whatever the code returns beside
arrays, such as a function or a distribution, passes as it is.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.types import Array, Jaxpr
from jaxmp.casting.kernels._interception import tracing, tracing_rule
from jaxmp.casting.plan.plan import JaxprPlan, Settings
from jaxmp.casting.planner._ambient_precision import without_ambient_precision
from jaxmp.casting.planner._whole_function import plan_jaxpr, read_settings
from jaxmp.casting.run._eager import compiled, is_eager
from jaxmp.casting.run._whole_function import run_plan


def region_settings(
    dtype: np.dtype,
    precision: Any = None,
    wide_gradients: bool = False,
    as_written: bool = False,
    quantize: str | None = None,
    half_blocks: int = 0,
) -> Settings:
    """What a region depends on.

    Args:
      dtype: the compute dtype.
      precision: of the matmuls that stay in float32.
      wide_gradients: whether weights get their gradients in float32.
      as_written: whether all else stays as it was traced.
      quantize: the recipe of the matmuls with weights; None leaves them in half.
      half_blocks: how many of the first and the last blocks are left in half.
    """
    return read_settings(dtype, (), True)._replace(
        matmul_precision=precision,
        wide_gradients=wide_gradients,
        as_written=as_written,
        quantize=quantize,
        half_blocks=half_blocks,
    )


_watchers: contextvars.ContextVar[tuple[Callable[[JaxprPlan], None], ...]] = (
    contextvars.ContextVar("watchers of plans", default=())
)


@contextlib.contextmanager
def watching_plans(watcher: Callable[[JaxprPlan], None]) -> Iterator[None]:
    """Shows a function the plan of every region that is traced meanwhile."""
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)


def run_region(
    function: Callable[..., Any],
    args: Any,
    settings: Settings,
    named_scopes: bool,
    watch: Callable[[JaxprPlan], None] | None = None,
    around_rules: Callable[[], Any] = contextlib.nullcontext,
) -> Any:
    """Calls a function whose operations are planned.

    Args:
      function: takes the items of `args`.
      args: pytrees; their arrays are traced, all else is as given.
      settings: what the plan depends on, see `region_settings`.
      named_scopes: as for `autocast`.
      watch: is shown the plan before it is run.
      around_rules: what is to be entered where a custom derivative rule is traced,
        which happens after the function has returned.

    Returns:
      What the function returns, its arrays in the dtypes that they have there.
    """

    @contextlib.contextmanager
    def around_planned_rules() -> Iterator[None]:
        with around_rules(), tracing_rule(settings):
            yield

    leaves, tree = jax.tree.flatten(tuple(args))
    is_traced = [_tree.is_array(x) for x in leaves]
    arrays = [x for x, traced in zip(leaves, is_traced, strict=True) if traced]
    returned: list[Any] = []

    def flat(*arrays: Array) -> list[Array]:
        remaining = iter(arrays)
        filled = [
            next(remaining) if traced else x
            for x, traced in zip(leaves, is_traced, strict=True)
        ]
        outs, out_tree = jax.tree.flatten(function(*jax.tree.unflatten(tree, filled)))
        statics = [None if isinstance(x, jax.Array) else (x,) for x in outs]
        returned[:] = [out_tree, statics]
        return [x for x in outs if isinstance(x, jax.Array)]

    with without_ambient_precision(), tracing(settings):
        jaxpr = jax.make_jaxpr(flat)(*arrays)
    plan, _ = plan_jaxpr(jaxpr, settings)
    for watcher in (*_watchers.get(), *([watch] if watch else ())):
        watcher(plan)
    if is_eager(jaxpr, arrays):
        outs = _compiled(settings, named_scopes)(jaxpr, arrays)
    else:
        outs = run_plan(
            plan,
            jaxpr,
            jaxpr.consts,
            arrays,
            named_scopes=named_scopes,
            around_rules=around_planned_rules,
        )
    results = iter(outs)
    out_tree, statics = returned
    outs = [next(results) if static is None else static[0] for static in statics]
    return jax.tree.unflatten(out_tree, outs)


@functools.lru_cache(maxsize=64)
def _compiled(
    settings: Settings, named_scopes: bool
) -> Callable[[Any, Sequence[Any]], list[Any]]:
    def execute(
        jaxpr: Jaxpr, consts: Sequence[Array], arrays: Sequence[Array]
    ) -> list[Array]:
        plan, _ = plan_jaxpr(jaxpr, settings)
        return run_plan(plan, jaxpr, consts, arrays, named_scopes=named_scopes)

    return compiled(execute, settings.compute_dtype)
