"""What is cast where an nnx layer is entered and left, by a same-name subclass."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmp import _tree
from jaxmp.modules._casts import carry_of, cast_carry, cast_inputs


@dataclasses.dataclass(frozen=True)
class Border:
    """The dtypes to cast to, None leaving things as they are, and a name scope."""

    inputs: np.dtype | None
    parameters: np.dtype | None
    output: np.dtype | None
    scope: str | None = None


def original_class(cls: type) -> type:
    """Returns the class that the user wrote."""
    return getattr(cls, "_original_class", cls)


@functools.lru_cache(maxsize=4096)
def with_border(cls: Any, border: Border, application: Any) -> Any:
    """The subclass of a class whose methods cast; equal borders share it.

    `application` is what was applied to the module, if it is the outermost one.
    """
    methods = {name: _casting(method, border) for name, method in _methods(cls).items()}

    def reduce(self, protocol):
        _, _, *state = cls.__reduce_ex__(self, protocol)
        return _rebuild, (cls, border, application), *state

    names = ("__module__", "__qualname__", "__doc__")
    return type(cls)(
        cls.__name__,
        (cls,),
        {
            **methods,
            **{name: getattr(cls, name) for name in names},
            "__reduce_ex__": reduce,
            "_original_class": cls,
            "_application": application,
        },
    )


def _rebuild(cls: type, border: Border, application: Any) -> Any:
    bordered = with_border(cls, border, application)
    return bordered.__new__(bordered)


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


def _methods(cls: type) -> dict[str, Callable[..., Any]]:
    """The methods that compute: the user's public ones, and two of Flax's."""
    methods: dict[str, Callable[..., Any]] = {}
    for base in reversed(cls.__mro__):
        is_users = not base.__module__.startswith(("flax.", "builtins"))
        for name, method in vars(base).items():
            computes = name in ("__call__", "attend") or (
                is_users and not name.startswith("_")
            )
            if computes and _is_method(method):
                methods[name] = method
    return methods


def _is_method(attribute: Any) -> bool:
    """True for functions, and for what `nnx.jit` makes of them."""
    is_bound_on_access = callable(attribute) and hasattr(attribute, "__get__")
    return is_bound_on_access and not isinstance(attribute, staticmethod)


def _casting(method: Callable[..., Any], border: Border) -> Callable[..., Any]:
    @functools.wraps(method)
    def casting(self, *args, **kwargs):
        with _entered(self) as from_outside:
            if not from_outside:
                return method(self, *args, **kwargs)
            with _named(border.scope), _cast_variables(self, border):
                bound = functools.partial(method, self)
                return _call(self, bound, border, args, kwargs)

    return casting


def _named(scope: str | None) -> Any:
    return contextlib.nullcontext() if scope is None else jax.named_scope(scope)


def _call(
    layer: nnx.Module,
    method: Callable[..., Any],
    border: Border,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if border.output is None:
        return method(*args, **kwargs)
    is_cell = isinstance(layer, nnx.RNNCellBase)
    carry = carry_of(args, kwargs) if is_cell else None
    if border.inputs is not None:
        args, kwargs = cast_inputs(args, kwargs, border.inputs, carry)
    output = method(*args, **kwargs)
    return cast_carry(carry, output, border.output)


_inside: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar(
    "layers", default=frozenset()
)


@contextlib.contextmanager
def _entered(layer: nnx.Module) -> Iterator[bool]:
    """Tells whether a method is called from outside or by another one of the layer."""
    inside = _inside.get()
    token = _inside.set(inside | {id(layer)})
    try:
        yield id(layer) not in inside
    finally:
        _inside.reset(token)


@contextlib.contextmanager
def _cast_variables(layer: Any, border: Border) -> Iterator[None]:
    """Replaces parameters and caches by cast ones; what is set in them is kept."""
    copies: list[tuple[nnx.Variable, nnx.Variable, Any]] = []

    def cast(variable):
        if isinstance(variable, nnx.Param) and border.parameters is not None:
            value = _tree.cast_floating(variable[...], border.parameters)
        elif _is_cache_of_other_dtype(layer, variable):
            value = variable[...].astype(layer.dtype)
        else:
            return variable
        copies.append((variable, variable.copy(value), value))
        return copies[-1][1]

    before = dict(vars(layer))
    replaced = {name: map_variables(cast, value) for name, value in before.items()}
    replaced = {name: new for name, new in replaced.items() if new is not before[name]}
    vars(layer).update(replaced)
    try:
        yield
    finally:
        for name, new in replaced.items():
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
