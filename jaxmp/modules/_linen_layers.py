"""What a policy changes on one call of one linen layer."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

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


def adapt_flax_layer(
    module: nn.Module,
    method: str,
    dtypes: LayerDtypes,
    is_entry: bool,
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a layer of Flax's own with `dtype` set to what it has to compute in."""
    settings = _settings(module, method, dtypes)
    if _is_authors_choice(module, settings, dtypes):
        with _parameters(module, dtypes.params, None):
            return fun(*args, **kwargs)
    with _attributes(module, settings), _parameters(module, dtypes.params, None):
        output = fun(*args, **kwargs)
    if not is_entry:
        return output
    is_cell = isinstance(module, nn.RNNCellBase)
    carry = carry_of(args, kwargs) if is_cell else None
    return cast_carry(carry, output, dtypes.output)


def adapt_user_layer(
    module: nn.Module,
    method: str,
    dtypes: LayerDtypes,
    is_entry: bool,
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a layer of the user's with inputs and parameters cast, and its output."""
    del method
    with _parameters(module, dtypes.params, dtypes.compute):
        if not is_entry:
            return fun(*args, **kwargs)
        is_cell = isinstance(module, nn.RNNCellBase)
        carry = carry_of(args, kwargs) if is_cell else None
        args, kwargs = cast_inputs(args, kwargs, dtypes.compute, is_cell=is_cell)
        return cast_carry(carry, fun(*args, **kwargs), dtypes.output)


def adapt_transparent_layer(
    module: nn.Module,
    method: str,
    dtypes: LayerDtypes,
    is_entry: bool,
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a layer that hands on what it gets; only its parameters are stored alike.

    The `dtype` of a norm of parameters is that of the parameters which it returns.
    """
    del method, is_entry
    is_weight_norm = isinstance(module, (nn.SpectralNorm, nn.WeightNorm))
    settings = {"dtype": dtypes.params} if is_weight_norm else {}
    with _attributes(module, settings), _parameters(module, dtypes.params, None):
        return fun(*args, **kwargs)


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
