"""Same-name subclasses of nnx layers, which cast where a layer is entered and left."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from flax import nnx

from jaxmp import _tree
from jaxmp._jaxpr.flax_internals import is_users
from jaxmp.casting.kernels.border import shown
from jaxmp.casting.plan.plan import JaxprPlan, Settings
from jaxmp.casting.quantized.formats import warn_if_nothing
from jaxmp.modules._casts import carry_of, cast_carry, cast_inputs, show_result
from jaxmp.modules._effect import check_plan
from jaxmp.modules._handed_down import fields_of, handed_down
from jaxmp.modules._layers import Application, application_of, named, original_class
from jaxmp.modules._nnx_region import ReturnsModule, run_method
from jaxmp.modules._nnx_variables import cast_cache, cast_parameter, replaced
from jaxmp.modules._own_code import (
    as_decided,
    has_half,
    in_float32,
    inside_region,
    is_planned,
    kept_as_written,
    opens_region,
    region,
    region_dtype,
)


@dataclasses.dataclass(frozen=True)
class Border:
    """What happens where a layer is entered and left.

    Attributes:
      is_leaf: True for layers of Flax that compute in their own `dtype`.
      compute: compute dtype of a user's layer.
      params: dtype in which parameters are stored.
      output: dtype of the result; None leaves it alone.
      names_output: whether a rule of the user's names it.
      shown: dtype in which the code around sees a half result; None leaves it alone.
      hands_down: compute dtype that replaces a float32 `dtype` attribute; None leaves
        it alone.
      plans: whether own code is planned.
      named_scopes: whether planned code is named.
      scope: a name scope.
      gradients: a name scope that says in which dtype weights get their gradients.
      matmul: a name scope that says how matmuls are multiplied.
      region: what the plan of own code depends on; None for what cannot be planned.
      as_written: the same for what stays as it was traced; None if it needs no plan.
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
    scope: str | None = None
    gradients: str | None = None
    matmul: str | None = None
    region: Settings | None = None
    as_written: Settings | None = None


@functools.lru_cache(maxsize=4096)
def with_border(cls: Any, border: Border, application: Application | None) -> Any:
    """The subclass of a class whose methods cast; equal borders share it.

    Only the outermost module gets an `application`.
    """
    methods = {name: _casting(method, border) for name, method in _methods(cls).items()}

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
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


def _methods(cls: type) -> dict[str, Callable[..., Any]]:
    """The methods that compute: the user's public ones, and two of Flax's."""
    methods: dict[str, Callable[..., Any]] = {}
    for base in reversed(cls.__mro__):
        for name, method in vars(base).items():
            is_public = is_users(base) and not name.startswith("_")
            computes = is_public or name in ("__call__", "attend")
            if computes and _is_method(method):
                methods[name] = method
    return methods


def _is_method(attribute: Any) -> bool:
    """True for functions, and for what `nnx.jit` makes of them."""
    is_bound_on_access = callable(attribute) and hasattr(attribute, "__get__")
    return is_bound_on_access and not isinstance(attribute, staticmethod)


def _casting(method: Callable[..., Any], border: Border) -> Callable[..., Any]:
    @functools.wraps(method)
    def casting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _entered(self) as from_outside:
            if not from_outside:
                return method(self, *args, **kwargs)
            if border.plans and opens_region(border.compute) and not border.is_leaf:
                return _open_region(self, casting, method, border, args, kwargs)
            if border.as_written is not None and not is_planned():
                return _run_as_written(self, casting, border, args, kwargs)
            if border.is_leaf:
                return _call_leaf(self, method, border, args, kwargs)
            return _call_users(self, method, border, args, kwargs)

    return casting


def _call_leaf(
    layer: nnx.Module,
    method: Callable[..., Any],
    border: Border,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a layer of Flax's, whose settings make it compute in its dtypes."""
    carry = carry_of(layer, args, kwargs)
    cast = functools.partial(cast_cache, layer)
    with (
        named(border.scope),
        named(border.gradients),
        named(border.matmul),
        as_decided(),
        replaced(layer, cast),
    ):
        output = method(layer, *args, **kwargs)
        if border.output is not None:
            output = cast_carry(carry, output, border.output)
    if border.shown is None or region_dtype() is None:
        return output
    return show_result(carry, output, border.shown)


def _open_region(
    layer: nnx.Module,
    casting: Callable[..., Any],
    method: Callable[..., Any],
    border: Border,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        carry = carry_of(layer, args[1:], kwargs)
        output = casting(*args, **kwargs)
        if border.output is None:
            return output
        return cast_carry(carry, output, border.output)

    assert border.region is not None
    around = functools.partial(inside_region, border.compute)
    try:
        with region(border.compute):
            return run_method(
                run,
                (layer, *args),
                kwargs,
                border.region,
                border.named_scopes,
                functools.partial(_check_plan, layer, method),
                around,
            )
    except ReturnsModule:
        return method(layer, *args, **kwargs)


def _run_as_written(
    layer: nnx.Module,
    casting: Callable[..., Any],
    border: Border,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a method that no region is around, for what only a plan can do."""
    assert border.as_written is not None
    try:
        with kept_as_written():
            return run_method(
                casting,
                (layer, *args),
                kwargs,
                border.as_written,
                border.named_scopes,
                functools.partial(_check_quantized, layer, casting),
                contextlib.nullcontext,
            )
    except ReturnsModule:
        with kept_as_written():
            return casting(layer, *args, **kwargs)


def _check_plan(layer: nnx.Module, method: Callable[..., Any], plan: JaxprPlan) -> None:
    """Raises if the policy changes nothing in a whole model."""
    application = application_of(layer)
    if application is not None and method.__name__ == "__call__":
        check_plan(plan, {}, type(layer).__name__, application)


def _check_quantized(
    layer: nnx.Module, method: Callable[..., Any], plan: JaxprPlan
) -> None:
    """Warns if the policy was to quantise matmuls of a whole model, and did none."""
    application = application_of(layer)
    if application is not None and method.__name__ == "__call__":
        name = original_class(type(layer)).__name__
        warn_if_nothing(plan, application.policy.quantize, name)


def _call_users(
    layer: nnx.Module,
    method: Callable[..., Any],
    border: Border,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a layer of the user's: planned in a region, and cast around outside one."""
    around = region_dtype()
    carry = carry_of(layer, args, kwargs)
    reads = shown if around is not None else _tree.cast_floating
    dtype = _tree.FLOAT32 if around is not None else border.compute
    cast = functools.partial(cast_parameter, functools.partial(reads, dtype=dtype))
    with (
        named(border.scope),
        named(border.gradients),
        named(border.matmul),
        _handing_down(layer, border),
        replaced(layer, cast),
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


@contextlib.contextmanager
def _handing_down(layer: nnx.Module, border: Border) -> Iterator[None]:
    """Sets float32 dtypes in attributes and configs to the policy's for a while."""
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
    """Marks a layer as running; yields whether it is called from outside itself."""
    inside = _inside.get()
    token = _inside.set(inside | {id(layer)})
    try:
        yield id(layer) not in inside
    finally:
        _inside.reset(token)
