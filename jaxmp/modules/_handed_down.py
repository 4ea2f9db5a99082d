"""A `dtype` that a model hands down to its layers: plumbing, not intent.

By Flax's convention a module computes in its `dtype` and passes it on to the layers
that it makes: `nn.Dense(4, dtype=self.dtype)`. Most public models declare
`dtype: Any = jnp.float32`, in a field or in a config, because it needs some default. A
layer that was handed this default does not insist on float32; a layer that is written
with it, such as `nn.Dense(4, dtype=jnp.float32)`, does.

To distinguish the two, a float32 in such a field is replaced by `HandedDown` while the
module runs: it is float32 in every respect, but can be recognised. The code of the
module then is the program that its author wrote and tested in float32, casts and masks
included, and is planned as a whole. Where nothing is planned, the field holds the
policy's dtype.

Configs are copied; nothing that the caller holds is changed.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmp._tree import FLOAT32

# The names that public configs use: Flax, MaxText, EasyLM, Big Vision, Scenic.
_COMPUTE = frozenset(
    [
        "dtype",
        "compute_dtype",
        "computation_dtype",
        "activation_dtype",
        "activations_dtype",
        "dtype_mm",
    ]
)
_PARAMS = frozenset(["param_dtype", "params_dtype", "weight_dtype", "weights_dtype"])
_ScalarType: Any = type(jnp.float32)
HandedDown = _ScalarType("float32", (jnp.float32,), {"dtype": FLOAT32})
"""float32, as a module hands it down."""


def is_float32(value: Any) -> bool:
    """True for float32 as a dtype, a scalar type or a name."""
    if not isinstance(value, (str, type, np.dtype)):
        return False
    try:
        return jnp.dtype(value) == FLOAT32
    except TypeError:
        return False


def fields_of(module: Any) -> dict[str, Any]:
    """The attributes of a module that may hold a dtype or a config."""
    own = {name: x for name, x in vars(module).items() if not name.startswith("_")}
    own.pop("parent", None)
    return {**_of_class(type(module)), **own}


@functools.lru_cache(maxsize=4096)
def _of_class(cls: type) -> dict[str, Any]:
    """The attributes of a class that are float32 dtypes."""
    of_class = {
        name: inspect.getattr_static(cls, name, None) for name in _COMPUTE | _PARAMS
    }
    return {name: x for name, x in of_class.items() if is_float32(x)}


def was_handed_down(dtype: Any, by_module: bool) -> bool:
    """Returns whether a module has handed a layer its float32.

    Args:
      dtype: the layer's `dtype`.
      by_module: whether a module around it has a float32 to hand down. If so, a name or
        a NumPy dtype, which cannot be marked, counts as handed down too.
    """
    if dtype is HandedDown:
        return True
    return by_module and is_float32(dtype) and not isinstance(dtype, _ScalarType)


def hands_down(fields: Mapping[str, Any]) -> bool:
    """Whether fields, or configs in them, hold a float32 compute dtype."""
    return bool(handed_down(fields, jnp.dtype(jnp.bfloat16), FLOAT32))


def handed_down(
    fields: Mapping[str, Any], compute: Any, params: np.dtype, depth: int = 3
) -> dict[str, Any]:
    """Returns new values for the fields in which a module hands dtypes down.

    Args:
      fields: its fields or attributes, by name: dtypes, configs that hold dtypes, and
        layer classes with a dtype bound by `functools.partial`.
      compute: replaces a float32 compute dtype; a dtype or `HandedDown`.
      params: replaces a float32 parameter dtype.
      depth: how many levels of nested configs to search.

    Returns:
      The fields that change, with their new values.
    """
    changed = {}
    for name, value in fields.items():
        new = _new_dtype(name, value, compute, params)
        if new is None and depth > 0:
            new = _new_holder(value, compute, params, depth - 1)
        if new is not None:
            changed[name] = new
    return changed


def _new_dtype(name: str, value: Any, compute: Any, params: np.dtype) -> Any | None:
    """The new dtype of a field, written in the form that the author used there."""
    dtype = compute if name in _COMPUTE else params if name in _PARAMS else None
    if dtype is None or not is_float32(value):
        return None
    if dtype is HandedDown:
        is_marked = value is HandedDown or not isinstance(value, _ScalarType)
        return None if is_marked else HandedDown
    if dtype == FLOAT32:
        return None
    if isinstance(value, str):
        return dtype.name
    return dtype if isinstance(value, np.dtype) else getattr(jnp, dtype.name)


def _new_holder(value: Any, compute: Any, params: np.dtype, depth: int) -> Any | None:
    """A copy of a config or a partial with new dtypes; None if it holds none."""
    if isinstance(value, functools.partial):
        new = handed_down(value.keywords, compute, params, depth)
        if not new:
            return None
        return functools.partial(value.func, *value.args, **{**value.keywords, **new})
    if type(value) is not dict and not _is_config(value):
        return None
    entries = {name: x for name, x in _entries(value).items() if isinstance(name, str)}
    new = handed_down(entries, compute, params, depth)
    return _copied(value, new) if new else None


def _is_config(value: Any) -> bool:
    """True for a plain object with fields, but not arrays, modules or functions."""
    if value is None or callable(value) or isinstance(value, (nn.Module, nnx.Module)):
        return False
    if type(value).__module__.split(".")[0] in ("builtins", "numpy", "jax", "jaxlib"):
        return False
    if isinstance(value, nnx.Variable):
        return False
    return hasattr(value, "__dict__") or dataclasses.is_dataclass(value)


def _entries(config: Any) -> Mapping[str, Any]:
    """The fields of a config, as it shows them."""
    if dataclasses.is_dataclass(config):
        names = [field.name for field in dataclasses.fields(config)]
        return {name: getattr(config, name) for name in names if hasattr(config, name)}
    if _is_mapping(config):
        return dict(config.items())
    return vars(config)


def _copied(config: Any, new: Mapping[str, Any]) -> Any:
    if _is_mapping(config):
        return type(config)({**dict(config.items()), **new})
    config = copy.copy(config)
    for name, value in new.items():
        object.__setattr__(config, name, value)
    return config


def _is_mapping(config: Any) -> bool:
    """True for dictionaries and the like, such as configs of ml_collections."""
    is_like_one = hasattr(config, "items") and hasattr(config, "__getitem__")
    return is_like_one and not dataclasses.is_dataclass(config)
