"""The default precision of matmuls that is in force around a call.

It says nothing about one matmul in particular, so the program is traced without it;
what stays in float32 gets it back.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype
from jaxmp._jaxpr.marks import AUTOCAST_SCOPE, FULL_PRECISION_SCOPE
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp._jaxpr.rewrite import map_equations, map_held
from jaxmp._jaxpr.scopes import scope_names
from jaxmp._jaxpr.types import Eqn
from jaxmp.casting.plan.plan import Settings
from jaxmp.casting.plan.states import FLOAT32


def without_ambient_precision() -> Any:
    """A context in which only `precision=` at a matmul sets its precision."""
    return jax.default_matmul_precision(None)


def ambient_precision() -> Any:
    """The `precision` parameter of matmuls that are traced here and name none.

    It comes from `jax.default_matmul_precision` or `jax_default_matmul_precision`.
    """
    config: Any = jax.config
    if config.jax_default_matmul_precision is None:
        return None
    x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    (eqn,) = jax.make_jaxpr(lambda x: jax.lax.dot(x, x))(x).eqns
    return eqn.params["precision"]


def precision_params(eqn: Eqn, settings: Settings) -> dict[str, Any] | None:
    """The parameters of what stays in float32: with the policy's algorithm, or ambient.

    Returns:
      What replaces the parameters of the equation; None if they stay.
    """
    asked = settings.matmul_precision
    if asked is not None and _takes(eqn, asked):
        is_pair = isinstance(asked, jax.lax.Precision)
        return {**eqn.params, "precision": (asked, asked) if is_pair else asked}
    params = with_ambient_precision(eqn, eqn.params, settings.ambient)
    return None if params is eqn.params else params


def _takes(eqn: Eqn, precision: Any) -> bool:
    """Whether a policy decides about the algorithm of an equation."""
    name = eqn.primitive.name
    return (
        name in MATMULS
        and (isinstance(precision, jax.lax.Precision) or name == "dot_general")
        and eqn.params.get("precision") is None
        and castable_dtype(eqn.outvars[0]) == FLOAT32
        and not {FULL_PRECISION_SCOPE, AUTOCAST_SCOPE} & set(scope_names(eqn))
    )


def with_ambient_precision(
    eqn: Eqn, params: dict[str, Any], precision: Any
) -> dict[str, Any]:
    """The parameters of an equation that is bound as traced, with a precision.

    Args:
      eqn: the equation.
      params: its parameters, or what replaces them.
      precision: for matmuls that name none and have an operand that is not half; also
        for those in the bodies of a call.

    Returns:
      The parameters, the same object if nothing changes.
    """
    if precision is None:
        return params
    if eqn.primitive.name in MATMULS:
        is_half = all(castable_dtype(v) in _tree.HALF for v in eqn.invars[:2])
        if is_half or params.get("precision") is not None:
            return params
        return {**params, "precision": precision}

    def in_equation(eqn: Eqn) -> Any:
        params = with_ambient_precision(eqn, eqn.params, precision)
        return eqn if params is eqn.params else eqn.replace(params=params)

    return map_held(params, lambda jaxpr: map_equations(jaxpr, in_equation))
