"""The settings that make one of Flax's own nnx layers compute in its dtypes.

The layer's `promote_dtype` function remembers what the author wrote, so that another
policy can start from there.
"""

import dataclasses
import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxmp._jaxpr.flax_internals import is_flax_layer, promotion_of
from jaxmp.modules._attention import dot_product_attention
from jaxmp.modules._casts import as_table
from jaxmp.modules._layers import LayerDtypes, is_of_flax, kind_of

# Their `dtype` is the dtype of the parameters that they normalise.
WEIGHT_NORMS = (nnx.SpectralNorm, nnx.WeightNorm)


def is_transparent(cls: type) -> bool:
    """True for layers of Flax that pass values on: Dropout, Sequential, RNN."""
    if not is_flax_layer(cls):
        return False
    if issubclass(cls, WEIGHT_NORMS):
        return True
    layers = filter(is_flax_layer, cls.__mro__)
    return not any("dtype" in inspect.signature(x.__init__).parameters for x in layers)


def has_settings(layer: nnx.Module) -> bool:
    """True for layers of Flax's own that compute in the `dtype` they are built with."""
    has_dtype = hasattr(layer, "dtype") and promotion_of(layer) is not None
    return is_of_flax(type(layer)) and has_dtype


def author_dtype(layer: Any) -> Any:
    """The `dtype` that a layer of Flax was built with; None if it got none."""
    dtype = layer.dtype
    if isinstance(layer, nnx.Embed) and dtype == layer.param_dtype:
        return None  # Embed's value for no dtype at all
    return None if dtype is None else jnp.dtype(dtype)


def settings_for(layer: Any, dtypes: LayerDtypes) -> dict[str, Any]:
    """The attributes that make a layer compute in its dtypes."""
    kind, name = kind_of(layer), promotion_of(layer)
    assert name is not None
    dtype, promotes = dtypes.compute, "dtype"
    if kind == "norm" and dtypes.compute.itemsize >= 4:
        # Flax casts the arguments to `dtype` before it computes, and the result after.
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
    """Resets the attributes that an earlier policy set to what the author wrote."""
    name = promotion_of(layer)
    promotion = getattr(layer, name) if name else None
    if name and isinstance(promotion, _Promotion):
        layer.dtype = promotion.author_dtype
        setattr(layer, name, promotion.author)
        if promotion.author_had_no_precision:
            layer.precision = None
    if getattr(layer, "attention_fn", None) is dot_product_attention:
        layer.attention_fn = nnx.dot_product_attention


def forget_default(layer: nnx.Module) -> None:
    """Removes the float32 that `SimpleCell`, alone among the cells, has by default.

    In the two layers inside, it would look like an author's choice.
    """
    if isinstance(layer, nnx.SimpleCell) and layer.dtype == jnp.float32:
        for part in (layer, layer.dense_h, layer.dense_i):
            part.dtype = None


@dataclasses.dataclass(frozen=True)
class _Promotion:
    """A layer's promotion to one dtype, which remembers the author's settings."""

    author: Any
    author_dtype: Any
    promotes: str
    author_had_no_precision: bool

    def __call__(self, args: Any, /, *, dtype: Any = None, **kwargs: Any) -> Any:
        if self.promotes == "float32":
            dtype = jnp.promote_types(dtype, jnp.float32)
        if self.promotes == "table" and len(args) == 1:
            return tuple(map(as_table, args))
        return self.author(args, dtype=dtype, **kwargs)
