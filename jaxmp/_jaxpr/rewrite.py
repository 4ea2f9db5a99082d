"""The same program with other equations."""

from collections.abc import Callable
from typing import Any

from jaxmp._jaxpr.calls import is_jaxpr
from jaxmp._jaxpr.matmuls import is_quantized_matmul
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr


def map_equations(jaxpr: Jaxpr, change: Callable[[Any], Any]) -> Any:
    """The jaxpr with `change(equation)` for each of its own equations.

    Returns:
      The same object if every equation comes back as it is.
    """
    opened = open_jaxpr(jaxpr)
    eqns = [change(eqn) for eqn in opened.eqns]
    if all(new is old for new, old in zip(eqns, opened.eqns, strict=True)):
        return jaxpr
    opened = opened.replace(eqns=eqns)
    return jaxpr.replace(jaxpr=opened) if hasattr(jaxpr, "jaxpr") else opened


def map_held(params: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The parameters of an equation with `change(jaxpr)` for each jaxpr in them.

    Returns:
      The same object if every jaxpr comes back as it is.
    """

    def mapped(value: Any) -> Any:
        if is_jaxpr(value):
            return change(value)
        if isinstance(value, tuple) and any(map(is_jaxpr, value)):
            items = tuple(map(mapped, value))
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else items
        return value

    new = {name: mapped(value) for name, value in params.items()}
    return new if any(new[name] is not params[name] for name in new) else params


def with_lines_of_custom_rules(jaxpr: Jaxpr) -> Any:
    """The same jaxpr, whose custom derivative rules are traced under their own lines.

    JAX traces the rule of a call in a jaxpr under the source line of the call. So it
    may be for a quantised matmul, whose rule no user wrote.
    """
    from jax._src import source_info_util

    def under_own_lines(rule: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ambient = source_info_util._source_info_context
        before = ambient.context
        fresh = source_info_util.new_source_info()
        ambient.context = fresh.replace(name_stack=before.name_stack)
        try:
            return rule(*args, **kwargs)
        finally:
            ambient.context = before

    def in_jaxpr(jaxpr: Jaxpr) -> Any:
        return map_equations(jaxpr, in_equation)

    def in_equation(eqn: Eqn) -> Any:
        params = map_held(eqn.params, in_jaxpr)
        if is_quantized_matmul(eqn):
            return eqn if params is eqn.params else eqn.replace(params=params)
        for name in _RULES.get(eqn.primitive.name, ()):
            if hasattr(params.get(name), "wrap"):
                wrapped = params[name].wrap(under_own_lines, (), None)
                params = {**params, name: wrapped}
        return eqn if params is eqn.params else eqn.replace(params=params)

    return in_jaxpr(jaxpr)


_RULES = {
    "custom_jvp_call": ("jvp_jaxpr_fun",),
    "custom_vjp_call": ("fwd_jaxpr_thunk", "bwd"),
}
