"""The settings that make one of Flax's own nnx layers compute as it should.

What the author wrote is remembered in the layer's `promote_dtype` function, so that
another policy starts from there.
"""

import dataclasses
import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxmp._jaxpr.flax_internals import PROMOTIONS, is_flax_layer
from jaxmp.modules._attention import dot_product_attention
from jaxmp.modules._layers import LayerDtypes, is_of_flax, kind_of

# Their `dtype` is that of the parameters that they normalise; they hand on all else.
WEIGHT_NORMS = (nnx.SpectralNorm, nnx.WeightNorm)


def is_transparent(cls: type) -> bool:
    """True for layers of Flax that hand on what they get: Dropout, Sequential, RNN."""
    if not is_flax_layer(cls):
        return False
    if issubclass(cls, WEIGHT_NORMS):
        return True
    layers = filter(is_flax_layer, cls.__mro__)
    return not any("dtype" in inspect.signature(x.__init__).parameters for x in layers)


def has_settings(layer: nnx.Module) -> bool:
    """True for layers of Flax's own that compute in a dtype they are built with."""
    has_dtype = hasattr(layer, "dtype") and _promotion_name(layer) is not None
    return has_dtype and is_of_flax(type(layer))


def author_dtype(layer: Any) -> Any:
    """The `dtype` that a layer of Flax was built with, None if none was given."""
    dtype = layer.dtype
    if isinstance(layer, nnx.Embed) and dtype == layer.param_dtype:
        return None  # what Embed makes of no dtype at all
    return None if dtype is None else jnp.dtype(dtype)


def settings_for(layer: Any, dtypes: LayerDtypes) -> dict[str, Any]:
    """The attributes to set."""
    kind, name = kind_of(layer), _promotion_name(layer)
    assert name is not None
    dtype, promotes = dtypes.compute, "dtype"
    if kind == "norm" and dtypes.compute.itemsize >= 4:
        # Flax casts the arguments to `dtype` before, and the result after.
        dtype, promotes = dtypes.output, "float32"
    if kind == "embed":
        # The rows are cast after the lookup, not the whole table before it.
        promotes = "table"
    no_precision = getattr(layer, "precision", ...) is None
    settings = {
        "dtype": dtype,
        name: _Promotion(getattr(layer, name), layer.dtype, promotes, no_precision),
    }
    if dtypes.precision is not None and no_precision:
        settings["precision"] = dtypes.precision
    is_half = dtypes.compute.itemsize < 4
    has_default = getattr(layer, "attention_fn", None) is nnx.dot_product_attention
    if is_half and has_default:
        settings["attention_fn"] = dot_product_attention
    return settings


def undo_settings(layer: Any) -> None:
    """Sets what an earlier policy set back to what the author wrote."""
    name = _promotion_name(layer)
    promotion = getattr(layer, name) if name else None
    if name and isinstance(promotion, _Promotion):
        layer.dtype = promotion.author_dtype
        setattr(layer, name, promotion.author)
        if promotion.author_had_no_precision:
            layer.precision = None
    if getattr(layer, "attention_fn", None) is dot_product_attention:
        layer.attention_fn = nnx.dot_product_attention


def forget_default(layer: nnx.Module) -> None:
    """Sets the float32 to None that `SimpleCell`, alone among the cells, starts with.

    In the two layers that it makes with it, that would look like an author's choice.
    """
    if isinstance(layer, nnx.SimpleCell) and layer.dtype == jnp.float32:
        for part in (layer, layer.dense_h, layer.dense_i):
            part.dtype = None


@dataclasses.dataclass(frozen=True)
class _Promotion:
    author: Any
    author_dtype: Any
    promotes: str
    author_had_no_precision: bool

    def __call__(self, args: Any, /, *, dtype: Any = None, **kwargs: Any) -> Any:
        if self.promotes == "float32":
            dtype = jnp.promote_types(dtype, jnp.float32)
        if self.promotes == "table" and len(args) == 1:
            return args
        return self.author(args, dtype=dtype, **kwargs)


def _promotion_name(layer: nnx.Module) -> str | None:
    return next((name for name in PROMOTIONS if hasattr(layer, name)), None)
