"""A whole function run: its arrays cast on the way in and out, its plan in between."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.marks import AUTOCAST_SCOPE
from jaxmp._jaxpr.types import Jaxpr
from jaxmp.casting.plan.plan import JaxprPlan
from jaxmp.casting.plan.states import FLOAT32
from jaxmp.casting.run._executor import Executor, cast


def run_plan(
    plan: JaxprPlan,
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    arrays: Sequence[Any],
    output_dtype: Any = None,
    *,
    named_scopes: bool,
    around_rules: Callable[[], Any] = contextlib.nullcontext,
) -> list[Any]:
    """Runs the plan of a whole traced function on its arrays."""
    with jax.named_scope(AUTOCAST_SCOPE):
        args = [cast_input(x, s) for x, s in zip(arrays, plan.in_states, strict=True)]
        executor = Executor(named_scopes, around_rules)
        outs = executor.run(plan, consts, args)
        dtypes = out_dtypes(jaxpr, output_dtype)
        return [
            cast_output(x, v, dtype)
            for x, v, dtype in zip(outs, jaxpr.jaxpr.outvars, dtypes, strict=True)
        ]


def out_dtypes(jaxpr: Jaxpr, output_dtype: Any) -> list[np.dtype | None]:
    """The dtypes that the outputs have; None for those that are not floats."""
    dtypes = map(castable_dtype, jaxpr.jaxpr.outvars)
    if output_dtype is None:
        return list(dtypes)
    return [None if dtype is None else jnp.dtype(output_dtype) for dtype in dtypes]


def cast_input(x: Any, state: Any) -> Any:
    """An input as the array that JAX takes it for."""
    return x if state is None else jnp.asarray(x, state.dtype or FLOAT32)


def cast_output(x: Any, v: Any, dtype: np.dtype | None) -> Any:
    """An output as an array, of a dtype if there is one for it."""
    if dtype is not None:
        return cast(x, dtype)
    # The value of a literal is a Python number.
    return jnp.asarray(x, v.aval.dtype) if is_literal(v) else x
