"""What a policy changes in one call of one linen layer."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.flax_internals import is_flax_layer, is_lifted
from jaxmp.casting.kernels.border import shown
from jaxmp.modules._attention import dot_product_attention
from jaxmp.modules._casts import (
    as_table,
    carry_of,
    cast_carry,
    cast_inputs,
    show_result,
)
from jaxmp.modules._handed_down import was_handed_down
from jaxmp.modules._layers import (
    LayerDtypes,
    Origin,
    declared_dtype,
    is_of_flax,
    kind_of,
    origin_of,
)
from jaxmp.modules._linen_fields import attributes, has_field
from jaxmp.modules._own_code import (
    as_decided,
    has_half,
    in_float32,
    region_dtype,
)

# Their `dtype` must not change: FP8 operations manage their own, and these norms
# normalise the parameters of the layer that they wrap.
_WITH_THEIR_OWN_DTYPE = ("Fp8", "NANOOFp8", "SpectralNorm", "WeightNorm")


def is_transparent(module: nn.Module) -> bool:
    """True for layers of Flax that pass values on: Dropout, Sequential, RNN."""
    for cls in type(module).__mro__:
        if is_flax_layer(cls):
            has_own = cls.__name__.startswith(_WITH_THEIR_OWN_DTYPE)
            return has_own or not has_field(module, "dtype")
        if not is_lifted(cls):
            return False
    return False


def is_leaf(module: nn.Module) -> bool:
    """True for layers of Flax that compute in their own `dtype`."""
    is_flax = is_of_flax(type(module)) and has_field(module, "dtype")
    return is_flax and not is_transparent(module)


class LayerCall(NamedTuple):
    """One call of one layer, with the dtypes that it should have.

    Attributes:
      module: the layer.
      method: name of the method.
      dtypes: its dtypes.
      explicit_dtype: as in `Application`.
      by_module: whether a module around it hands a float32 down.
      is_entry: whether it is called from outside, not by itself.
      fun: the method.
      args, kwargs: the arguments of the call.
    """

    module: nn.Module
    method: str
    dtypes: LayerDtypes
    explicit_dtype: str | None
    by_module: bool
    is_entry: bool
    fun: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def carry(self) -> Any:
        """The carry that a cell is called with; None for other layers."""
        return carry_of(self.module, self.args, self.kwargs)

    def run(self) -> Any:
        """Calls the method."""
        return self.fun(*self.args, **self.kwargs)


def adapt_flax_layer(call: LayerCall) -> Any:
    """Calls a layer of Flax's own with its `dtype` set to the one to compute in."""
    module, dtypes = call.module, call.dtypes
    settings = _settings(module, call.method, dtypes)
    origin = origin_in(call)
    if origin is Origin.AUTHOR:
        settings = {}
    with _parameters(module, dtypes.params, None):
        if not call.is_entry:
            with attributes(module, settings):
                return call.run()
        with attributes(module, settings), as_decided():
            output = call.run()
            if origin is not Origin.AUTHOR:
                output = cast_carry(call.carry, output, dtypes.output)
            return output


def adapt_user_layer(call: LayerCall) -> Any:
    """Calls a layer of the user's.

    In a region its code is planned, or left in float32 if a rule says so. Outside every
    region, its inputs, parameters and outputs are cast.
    """
    dtypes, region = call.dtypes, region_dtype()
    if region is None:
        return _cast_around(call, dtypes.compute)
    with _parameters(call.module, dtypes.params, _show_parameter):
        if not call.is_entry:
            return call.run()
        if dtypes.compute == region:
            output = call.run()
        else:
            args, kwargs = cast_inputs(
                call.args, call.kwargs, dtypes.compute, call.carry
            )
            with in_float32(dtypes.compute):
                output = call.fun(*args, **kwargs)
        # A layer that took half returns half; the plan reads any other result.
        is_narrowed = dtypes.compute != region and has_half((call.args, call.kwargs))
        if is_narrowed or dtypes.names_output:
            return cast_carry(call.carry, output, dtypes.output)
        return output


def _cast_around(call: LayerCall, dtype: np.dtype) -> Any:
    def read(x: Any) -> Any:
        return _tree.cast_floating(x, dtype)

    with _parameters(call.module, call.dtypes.params, read):
        if not call.is_entry:
            return call.run()
        args, kwargs = cast_inputs(call.args, call.kwargs, dtype, call.carry)
        output = call.fun(*args, **kwargs)
        return cast_carry(call.carry, output, call.dtypes.output)


def adapt_transparent_layer(call: LayerCall) -> Any:
    """Calls a layer that passes values on; only its parameters are stored as others.

    The `dtype` of a norm of parameters is the dtype of the parameters that it returns.
    """
    module, stored = call.module, call.dtypes.params
    is_weight_norm = isinstance(module, (nn.SpectralNorm, nn.WeightNorm))
    settings = {"dtype": stored} if is_weight_norm else {}
    with attributes(module, settings), _parameters(module, stored, None):
        return call.run()


def as_written(call: LayerCall, output: Any) -> Any:
    """The result of one of Flax's layers, as it would be without a policy."""
    is_kept = origin_in(call) is Origin.AUTHOR
    if region_dtype() is None or is_kept or call.dtypes.names_output:
        return output
    return show_result(call.carry, output, _declared(call.module))


def _show_parameter(x: Any) -> Any:
    return shown(x, jnp.float32)


def _declared(module: nn.Module) -> np.dtype:
    is_field = has_field(module, "param_dtype")
    return declared_dtype(vars(module).get("param_dtype") if is_field else None)


def _settings(module: nn.Module, method: str, dtypes: LayerDtypes) -> dict[str, Any]:
    """The fields that make a layer of Flax compute in its dtypes."""
    settings = _dtype_settings(module, method, dtypes)
    has_precision = has_field(module, "precision")
    if dtypes.precision is not None and has_precision and module.precision is None:
        settings["precision"] = dtypes.precision
    return settings


def _dtype_settings(module: Any, method: str, dtypes: LayerDtypes) -> dict[str, Any]:
    kind = kind_of(module)
    if kind == "norm":
        # Flax computes statistics and arithmetic in float32 unless asked to reduce
        # in half; `dtype` is the dtype of the output alone.
        if dtypes.compute.itemsize >= 4:
            return {"dtype": dtypes.output}
        settings: dict[str, Any] = {"dtype": dtypes.compute}
        if hasattr(module, "force_float32_reductions"):
            settings["force_float32_reductions"] = False
        return settings
    if kind == "embed" and method == "__call__":
        # With a dtype, Flax would cast the whole table and sum its gradient in half.
        return {"dtype": None, "promote_dtype": _read_table}
    if kind == "attention" and dtypes.compute.itemsize < 4:
        settings = {"dtype": dtypes.compute, "force_fp32_for_softmax": True}
        if module.attention_fn is nn.dot_product_attention and not (
            module.qk_attn_weights_einsum_cls or module.attn_weights_value_einsum_cls
        ):
            settings["attention_fn"] = dot_product_attention
        return settings
    return {"dtype": dtypes.compute}


def _read_table(table: Any, *, dtype: Any, inexact: bool) -> tuple[Any]:
    return (as_table(table),)


def origin_in(call: LayerCall) -> Origin:
    """Who decides the dtype of a layer, be it Flax's or the user's."""
    module: Any = call.module
    dtypes = call.dtypes
    if not is_leaf(module):
        return Origin.POLICY if dtypes.rule is None else Origin.RULE
    was_handed = call.explicit_dtype != "keep" and was_handed_down(
        module.dtype, call.by_module
    )
    expected = dtypes.expected(module)
    return origin_of(module.dtype, expected, dtypes, call.explicit_dtype, was_handed)


@contextlib.contextmanager
def _parameters(
    module: nn.Module, stored: np.dtype, read: Callable[[Any], Any] | None
) -> Iterator[None]:
    """Makes `module.param` store in one dtype, and return the parameter as read."""
    if "param" in vars(module):
        yield
        return
    declared = _declared(module)
    stored = stored if declared == jnp.float32 else declared

    def param(name: str, init_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def init_as_stored(*args: Any, **kwargs: Any) -> Any:
            return _tree.cast_floating(init_fn(*args, **kwargs), stored)

        value = type(module).param(module, name, init_as_stored, *args, **kwargs)
        return value if read is None else read(value)

    object.__setattr__(module, "param", param)
    try:
        yield
    finally:
        object.__delattr__(module, "param")
