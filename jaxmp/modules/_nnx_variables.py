"""The variables of one nnx layer: its own parameters, and others while it runs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx


def own_parameters(layer: nnx.Module) -> list[nnx.Param]:
    """Lists the parameters of a layer, without those of the layers inside."""
    found: list[nnx.Param] = []

    def collect(variable: nnx.Variable) -> nnx.Variable:
        if isinstance(variable, nnx.Param):
            found.append(variable)
        return variable

    map_variables(collect, list(vars(layer).values()))
    return found


def map_variables(fun: Callable[[nnx.Variable], Any], value: Any) -> Any:
    """Maps the variables in an attribute of a layer, without entering other layers."""
    if isinstance(value, nnx.Variable):
        return fun(value)
    if isinstance(value, (list, tuple, nnx.List)):
        items = [map_variables(fun, item) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        if same:
            return value
        is_named = hasattr(value, "_fields")
        return type(value)(*items) if is_named else type(value)(items)
    if isinstance(value, (dict, nnx.Dict)):
        entries = {key: map_variables(fun, item) for key, item in value.items()}
        same = all(entries[key] is item for key, item in value.items())
        return value if same else type(value)(entries)
    return value


def cast_parameter(read: Callable[[Any], Any], variable: nnx.Variable) -> Any | None:
    """A parameter as the code of its layer reads it; None leaves it alone."""
    if not isinstance(variable, nnx.Param):
        return None
    value = variable[...]
    new = read(value)
    return None if new is value else new


def cast_cache(layer: Any, variable: nnx.Variable) -> Any | None:
    """A cache in the dtype in which attention computes; None leaves it alone."""
    if _is_cache_of_other_dtype(layer, variable):
        return variable[...].astype(layer.dtype)
    return None


@contextlib.contextmanager
def replaced(
    layer: Any, new_value: Callable[[nnx.Variable], Any | None]
) -> Iterator[None]:
    """Replaces variables while a method runs, and keeps what it writes into them."""
    copies: list[tuple[nnx.Variable, nnx.Variable, Any]] = []

    def cast(variable: nnx.Variable) -> nnx.Variable:
        value = new_value(variable)
        if value is None:
            return variable
        copies.append((variable, variable.copy(value), value))
        return copies[-1][1]

    before = dict(vars(layer))
    mapped = {name: map_variables(cast, value) for name, value in before.items()}
    changed = {name: new for name, new in mapped.items() if new is not before[name]}
    vars(layer).update(changed)
    try:
        yield
    finally:
        for name, new in changed.items():
            if vars(layer).get(name) is new:
                vars(layer)[name] = before[name]
        for own, copy, value in copies:
            if copy.get_raw_value() is not value:
                own[...] = copy[...].astype(own.dtype)


def _is_cache_of_other_dtype(layer: Any, variable: nnx.Variable) -> bool:
    if not isinstance(variable, nnx.Cache):
        return False
    if not isinstance(layer, nnx.MultiHeadAttention) or layer.dtype is None:
        return False
    is_floating = jnp.issubdtype(variable.dtype, jnp.floating)
    return is_floating and variable.dtype != layer.dtype
