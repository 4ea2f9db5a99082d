"""What a policy changes on one call of one linen layer."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp.modules._attention import dot_product_attention
from jaxmp.modules._casts import carry_of, cast_carry, cast_inputs
from jaxmp.modules._layers import LayerDtypes, is_flax_layer, kind_of

# They have a `dtype` and are not to be given another one: FP8 operations manage their
# own, and these norms normalise the parameters of the layer that they wrap.
_WITH_THEIR_OWN_DTYPE = ("Fp8", "NANOOFp8", "SpectralNorm", "WeightNorm")


def is_transparent(module: nn.Module) -> bool:
    """True for layers of Flax that hand on what they get: Dropout, Sequential, RNN."""
    for cls in type(module).__mro__:
        if is_flax_layer(cls):
            has_own = cls.__name__.startswith(_WITH_THEIR_OWN_DTYPE)
            return has_own or "dtype" not in module.__dataclass_fields__
        if cls.__module__ != "flax.linen.transforms":
            return False
    return False


class LayerCall(NamedTuple):
    """One call of one layer, with the dtypes that it is to have.

    Attributes:
      module: the layer.
      method: name of the method.
      dtypes: its dtypes.
      is_entry: whether it is called from outside, and not by itself.
      fun: the method.
      args, kwargs: what it is called with.
    """

    module: nn.Module
    method: str
    dtypes: LayerDtypes
    is_entry: bool
    fun: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def carry(self) -> Any:
        """What a cell is called with as its carry; None for other layers."""
        is_cell = isinstance(self.module, nn.RNNCellBase)
        return carry_of(self.args, self.kwargs) if is_cell else None

    def run(self) -> Any:
        """Calls the method."""
        return self.fun(*self.args, **self.kwargs)


def adapt_flax_layer(call: LayerCall) -> Any:
    """Calls a layer of Flax's own with `dtype` set to what it has to compute in."""
    module, dtypes = call.module, call.dtypes
    settings = _settings(module, call.method, dtypes)
    if _is_authors_choice(module, settings, dtypes):
        with _parameters(module, dtypes.params, None):
            return call.run()
    with _attributes(module, settings), _parameters(module, dtypes.params, None):
        output = call.run()
    return cast_carry(call.carry, output, dtypes.output) if call.is_entry else output


def adapt_user_layer(call: LayerCall) -> Any:
    """Calls a layer of the user's with inputs and parameters cast, and its output."""
    dtypes = call.dtypes
    with _parameters(call.module, dtypes.params, dtypes.compute):
        if not call.is_entry:
            return call.run()
        args, kwargs = cast_inputs(call.args, call.kwargs, dtypes.compute, call.carry)
        return cast_carry(call.carry, call.fun(*args, **kwargs), dtypes.output)


def adapt_transparent_layer(call: LayerCall) -> Any:
    """Calls a layer that hands on what it gets; only its parameters are stored alike.

    The `dtype` of a norm of parameters is that of the parameters which it returns.
    """
    module, stored = call.module, call.dtypes.params
    is_weight_norm = isinstance(module, (nn.SpectralNorm, nn.WeightNorm))
    settings = {"dtype": stored} if is_weight_norm else {}
    with _attributes(module, settings), _parameters(module, stored, None):
        return call.run()


def _settings(module: nn.Module, method: str, dtypes: LayerDtypes) -> dict[str, Any]:
    """The fields of a Flax layer that make it compute as it should."""
    settings = _dtype_settings(module, method, dtypes)
    sets_precision = "precision" in module.__dataclass_fields__
    if dtypes.precision is not None and sets_precision and module.precision is None:
        settings["precision"] = dtypes.precision
    return settings


def _dtype_settings(module: Any, method: str, dtypes: LayerDtypes) -> dict[str, Any]:
    kind = kind_of(module)
    if kind == "norm":
        # Statistics and arithmetic are float32 whatever the dtype, which is that of
        # the output alone, unless Flax is told to reduce in half.
        if dtypes.compute.itemsize >= 4:
            return {"dtype": dtypes.output}
        settings: dict[str, Any] = {"dtype": dtypes.compute}
        if hasattr(module, "force_float32_reductions"):
            settings["force_float32_reductions"] = False
        return settings
    if kind == "embed" and method == "__call__":
        # With a dtype, the whole table would be cast and the gradient summed in half.
        return {"dtype": None}
    if kind == "attention" and dtypes.compute.itemsize < 4:
        settings = {"dtype": dtypes.compute, "force_fp32_for_softmax": True}
        if module.attention_fn is nn.dot_product_attention and not (
            module.qk_attn_weights_einsum_cls or module.attn_weights_value_einsum_cls
        ):
            settings["attention_fn"] = dot_product_attention
        return settings
    return {"dtype": dtypes.compute}


def authors_dtype(module: nn.Module, dtypes: LayerDtypes) -> Any:
    """Returns the `dtype` of a layer's author if it is to be kept, else None."""
    is_own = any(is_flax_layer(cls) for cls in type(module).__mro__)
    if not is_own or not hasattr(module, "dtype") or is_transparent(module):
        return None
    settings = _settings(module, "__call__", dtypes)
    is_kept = _is_authors_choice(module, settings, dtypes)
    return module.dtype if is_kept else None


def _is_authors_choice(
    module: nn.Module, settings: dict[str, Any], dtypes: LayerDtypes
) -> bool:
    """Whether the model's author set a dtype that no rule of the user's overrides."""
    dtype = getattr(module, "dtype", None)
    if dtype is None or dtype == settings["dtype"]:
        return False
    return dtypes.rule is None or dtypes.rule.yields_to_author


@contextlib.contextmanager
def _attributes(module: nn.Module, settings: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in settings}
    for name, value in settings.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


@contextlib.contextmanager
def _parameters(
    module: nn.Module, stored: np.dtype, read: np.dtype | None
) -> Iterator[None]:
    """Makes `module.param` store in one dtype and return another; None: as stored."""
    if "param" in vars(module):
        yield
        return
    declared = jnp.dtype(getattr(module, "param_dtype", None) or jnp.float32)
    stored = stored if declared == jnp.float32 else declared

    def param(name, init_fn, *args, **kwargs):
        def init_as_stored(*args, **kwargs):
            return _tree.cast_floating(init_fn(*args, **kwargs), stored)

        value = type(module).param(module, name, init_as_stored, *args, **kwargs)
        return value if read is None else _tree.cast_floating(value, read)

    object.__setattr__(module, "param", param)
    try:
        yield
    finally:
        object.__delattr__(module, "param")
