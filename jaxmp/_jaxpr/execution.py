"""Carries out equations and jaxprs on arrays, as they were written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.calls import BODY
from jaxmp._jaxpr.types import Array, Atom, Eqn, Jaxpr
from jaxmp._jaxpr.versions import jaxpr_consts, open_jaxpr

T = TypeVar("T")


def bind(eqn: Eqn, operands: Sequence[Array]) -> list[Array]:
    """The results of an equation on arrays."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*operands, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def result_avals(
    primitive: Any, avals: Sequence[Any], params: Mapping[str, Any]
) -> Sequence[Any]:
    """The abstract results of a primitive on abstract operands."""
    if primitive.name in BODY:
        return [v.aval for v in open_jaxpr(params[BODY[primitive.name]]).outvars]
    outs, _ = primitive.abstract_eval(*avals, **params)
    return outs if primitive.multiple_results else [outs]


def evaluate(
    jaxpr: Jaxpr,
    args: Sequence[Array],
    bind: Callable[[Eqn, Sequence[Array]], Sequence[Array]],
) -> list[Array]:
    """The results of a jaxpr, whose equations `bind(eqn, operands)` carries out.

    Args:
      jaxpr: with or without its constants.
      args: values of its inputs.
      bind: gives the results of an equation.
    """
    opened = open_jaxpr(jaxpr)
    values = dict(zip(opened.constvars, jaxpr_consts(jaxpr), strict=True))
    values.update(zip(opened.invars, args, strict=True))

    def read(atom: Atom) -> Array:
        return atom.val if is_literal(atom) else values[atom]

    for eqn in opened.eqns:
        outs = bind(eqn, list(map(read, eqn.invars)))
        values.update(zip(eqn.outvars, outs, strict=True))
    return list(map(read, opened.outvars))


def literal_array(atom: Atom) -> jax.Array:
    """The array that a literal stands for."""
    return jnp.asarray(atom.val, atom.aval.dtype)


def as_function(jaxpr: Jaxpr) -> Callable[..., list[Array]]:
    """A jaxpr with its constants as a function of arrays."""
    return jax.extend.core.jaxpr_as_fun(jaxpr)


def jit_exactly(run: Callable[..., T]) -> Callable[..., T]:
    """Compiles a function with every rounding to half precision that it asks for."""
    return jax.jit(run, compiler_options={"xla_allow_excess_precision": False})


def cond(pred: Array, on_true: Callable[[], T], on_false: Callable[[], T]) -> T:
    """`jax.lax.cond`, which outside a compiled function would compile every time."""
    if isinstance(pred, jax.core.Tracer):
        return jax.lax.cond(pred, on_true, on_false)
    return on_true() if pred else on_false()
