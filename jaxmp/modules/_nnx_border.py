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
from jaxmp.casting.kernels.border import shown
from jaxmp.casting.local import region_settings
from jaxmp.modules._casts import carry_of, cast_carry, cast_inputs
from jaxmp.modules._effect import check_plan
from jaxmp.modules._handed_down import fields_of, handed_down
from jaxmp.modules._nnx_region import ReturnsModule, run_method
from jaxmp.modules._own_code import (
    as_decided,
    has_half,
    in_float32,
    inside_region,
    opens_region,
    region,
    region_dtype,
)


@dataclasses.dataclass(frozen=True)
class Border:
    """What happens where a layer is entered and left.

    Attributes:
      is_leaf: True for layers of Flax that compute in a `dtype` of their own.
      compute: the compute dtype of a user's layer.
      params: the dtype in which parameters are stored.
      output: the dtype of what is returned; None leaves it.
      names_output: whether a rule of the user's names it.
      shown: the dtype in which the code around sees a half result; None leaves it.
      hands_down: the compute dtype that a float32 `dtype` attribute becomes; None
        leaves it.
      plans: whether own code is planned.
      named_scopes: whether what is planned is named.
      precision: of matmuls that stay in float32, as `precision=`.
      scope: a name scope.
    """

    is_leaf: bool
    compute: np.dtype
    params: np.dtype
    output: np.dtype | None
    names_output: bool = False
    shown: np.dtype | None = None
    hands_down: np.dtype | None = None
    plans: bool = True
    named_scopes: bool = True
    precision: Any = None
    scope: str | None = None


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
            if border.is_leaf:
                return _call_leaf(self, method, border, args, kwargs)
            if border.plans and opens_region(border.compute):
                return _open_region(self, casting, method, border, args, kwargs)
            return _call_users(self, method, border, args, kwargs)

    return casting


def _named(scope: str | None) -> Any:
    return contextlib.nullcontext() if scope is None else jax.named_scope(scope)


def _call_leaf(
    layer: nnx.Module,
    method: Callable[..., Any],
    border: Border,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a layer of Flax's, whose settings make it compute as it should."""
    carry = _carry(layer, args, kwargs)
    cast = functools.partial(_cast_cache, layer)
    with _named(border.scope), as_decided(), _replaced(layer, cast):
        output = method(layer, *args, **kwargs)
        if border.output is not None:
            output = cast_carry(carry, output, border.output)
    if border.shown is None or region_dtype() is None:
        return output
    if carry is None or not isinstance(output, tuple) or len(output) != 2:
        return shown(output, border.shown)
    return output[0], shown(output[1], border.shown)


def _open_region(
    layer: nnx.Module,
    casting: Callable[..., Any],
    method: Callable[..., Any],
    border: Border,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    def run(*args, **kwargs):
        carry = _carry(layer, args[1:], kwargs)
        output = casting(*args, **kwargs)
        return (
            output
            if border.output is None
            else cast_carry(carry, output, border.output)
        )

    around = functools.partial(inside_region, border.compute)
    try:
        with region(border.compute):
            return run_method(
                run,
                (layer, *args),
                kwargs,
                region_settings(border.compute, border.precision),
                border.named_scopes,
                functools.partial(_check_plan, layer, method),
                around,
            )
    except ReturnsModule:
        return method(layer, *args, **kwargs)


def _check_plan(layer: nnx.Module, method: Callable[..., Any], plan: Any) -> None:
    """Raises if the policy changes nothing of a whole model."""
    application = getattr(type(layer), "_application", None)
    if application is not None and method.__name__ == "__call__":
        check_plan(plan, {}, type(layer).__name__, application)


def _call_users(
    layer: nnx.Module,
    method: Callable[..., Any],
    border: Border,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a layer of the user's: in a region it is planned, outside cast around."""
    around = region_dtype()
    carry = _carry(layer, args, kwargs)
    reads = shown if around is not None else _tree.cast_floating
    read = jnp.dtype(jnp.float32) if around is not None else border.compute
    cast = functools.partial(_cast_parameter, functools.partial(reads, dtype=read))
    with (
        _named(border.scope),
        _handing_down(layer, border),
        _replaced(layer, cast),
    ):
        if around == border.compute:
            output = method(layer, *args, **kwargs)
            is_cast = border.names_output
        else:
            is_cast = around is None or has_half((args, kwargs)) or border.names_output
            args, kwargs = cast_inputs(args, kwargs, border.compute, carry)
            with _kept(around, border.compute):
                output = method(layer, *args, **kwargs)
    if border.output is None or not is_cast:
        return output
    return cast_carry(carry, output, border.output)


def _kept(around: np.dtype | None, dtype: np.dtype) -> Any:
    return contextlib.nullcontext() if around is None else in_float32(dtype)


def _carry(layer: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    is_cell = isinstance(layer, nnx.RNNCellBase)
    return carry_of(args, kwargs) if is_cell else None


@contextlib.contextmanager
def _handing_down(layer: nnx.Module, border: Border) -> Iterator[None]:
    """Sets float32 dtypes in attributes and configs to the policy's meanwhile."""
    if border.hands_down is None:
        yield
        return
    new = handed_down(fields_of(layer), border.hands_down, border.params)
    before = {name: vars(layer).get(name, _MISSING) for name in new}
    vars(layer).update(new)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                vars(layer).pop(name, None)
            elif vars(layer).get(name) is new[name]:
                vars(layer)[name] = value


_MISSING = object()


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


def _cast_parameter(read: Callable[[Any], Any], variable: nnx.Variable) -> Any | None:
    """What the code of a layer reads from its parameter; None leaves it."""
    if not isinstance(variable, nnx.Param):
        return None
    value = variable[...]
    new = read(value)
    return None if new is value else new


def _cast_cache(layer: Any, variable: nnx.Variable) -> Any | None:
    """A cache in the dtype in which attention computes; None leaves it."""
    if _is_cache_of_other_dtype(layer, variable):
        return variable[...].astype(layer.dtype)
    return None


@contextlib.contextmanager
def _replaced(
    layer: Any, new_value: Callable[[nnx.Variable], Any | None]
) -> Iterator[None]:
    """Replaces variables by others while a method runs; what is set in them is kept."""
    copies: list[tuple[nnx.Variable, nnx.Variable, Any]] = []

    def cast(variable):
        value = new_value(variable)
        if value is None:
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
