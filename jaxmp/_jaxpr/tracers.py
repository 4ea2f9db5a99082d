"""Tracers: how the values of an unfinished trace were made."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmp._jaxpr.atoms import is_literal, variables
from jaxmp._jaxpr.calls import BODY, CHECKPOINTS, JITS, held
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp._jaxpr.walk import makers


class Recorded(NamedTuple):
    """The equation of an unfinished trace that made a value.

    Attributes:
      name: of the primitive.
      inputs: the values that it was given, to be looked up in turn.
      equation: JAX's own record.
    """

    name: str
    inputs: tuple[Any, ...]
    equation: Any


class _Inside(NamedTuple):
    """A variable of a nested jaxpr, and the equation around it."""

    variable: Any
    producers: dict[Any, Any]
    outer: dict[Any, Any]

    @property
    def aval(self) -> Any:
        return self.variable.aval


def recorded_tangent(x: Any) -> Any:
    """The tangent of a value that is being differentiated, None if none is recorded."""
    tangent = getattr(x, "tangent", None)
    is_recorded = hasattr(tangent, "parent") and hasattr(tangent, "aval")
    return tangent if is_recorded else None


def recorded(x: Any) -> Recorded | None:
    """Looks up how an unfinished trace made a value; None for inputs and constants.

    A nested function that is called as it is (`jax.jit`, `jax.checkpoint`) is looked
    into: its result is what the last equation in it made.
    """
    if isinstance(x, _Inside):
        equation = x.producers.get(x.variable)
        if equation is None:
            outer = x.outer.get(x.variable)
            return None if outer is None else recorded(outer)
        values = [x._replace(variable=v) for v in variables(equation.invars)]
        if _name(equation) in _CALLS:
            return _last_inside(equation, x.variable, equation.invars, x)
        return Recorded(_name(equation), tuple(values), equation)
    equation: Any = getattr(x, "parent", None)
    if not hasattr(equation, "in_tracers"):
        return None
    if _name(equation) in _CALLS:
        return _last_inside(equation, x.val, equation.in_tracers, None)
    inputs = tuple(v for v in equation.in_tracers if hasattr(v, "aval"))
    return Recorded(_name(equation), inputs, equation)


def _name(equation: Any) -> str:
    """The name of a primitive; JAX 0.12 wraps those whose gradient it will need."""
    return getattr(equation.primitive, "prim", equation.primitive).name


_CALLS = frozenset((*JITS, *CHECKPOINTS, "closed_call"))


def _last_inside(
    equation: Any, result: Any, inputs: Sequence[Any], around: Any
) -> Recorded | None:
    jaxpr = open_jaxpr(equation.params[BODY[_name(equation)]])
    if len(jaxpr.invars) != len(inputs):
        return None
    position = [id(v) for v in equation.outvars].index(id(result))
    if around is not None:
        inputs = [around._replace(variable=v) for v in inputs]
    producers = makers(jaxpr)
    outer = dict(zip(jaxpr.invars, inputs, strict=True))
    variable = jaxpr.outvars[position]
    if is_literal(variable):
        return None
    return recorded(_Inside(variable, producers, outer))


def is_input(x: Any) -> bool:
    """Whether this is an argument of the function that is being traced."""
    return hasattr(x, "val") and getattr(x, "parent", "none") is None


def same_value(x: Any, y: Any) -> bool:
    """Whether two tracers of one function stand for one variable."""
    return x is y or (hasattr(x, "parent") and getattr(x, "val", x) is y.val)


def sources(x: Any) -> tuple[Any, Sequence[Any]] | None:
    """The equation of an unfinished trace that made a value, and all of its inputs."""
    equation: Any = getattr(x, "parent", None)
    if not hasattr(equation, "in_tracers"):
        return None
    return equation, equation.in_tracers


def is_transposed(equation: Any) -> bool:
    """Whether an equation, or one inside it, belongs to a backward pass."""
    if "transpose(" in str(equation.source_info.name_stack):
        return True
    return any(any(map(is_transposed, inner.eqns)) for inner in held(equation))
