"""Casts where a layer is entered and left; the carries of recurrent cells."""

from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmp import _tree
from jaxmp.casting.kernels.border import shown

T = TypeVar("T")


def cast_output(output: T, dtype: np.dtype) -> T:
    """Casts the result of a layer, but never narrows a scalar.

    A floating scalar among the outputs is a loss, such as a mixture of experts returns
    beside its activations; half precision would save nothing there.
    """

    def cast(x: Any) -> Any:
        is_scalar = _tree.is_array(x) and jnp.ndim(x) == 0
        if is_scalar and x.dtype.itemsize > dtype.itemsize:
            return x
        return _tree.cast_floating(x, dtype)

    return jax.tree.map(cast, output)


def cast_inputs(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: np.dtype, carry: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Casts the arguments of a layer, all but the carry, if it has one."""
    new_args, new_kwargs = _tree.cast_floating((args, kwargs), dtype)
    if carry is None:
        return new_args, new_kwargs
    if "carry" in kwargs:
        return new_args, {**new_kwargs, "carry": carry}
    return (carry, *new_args[1:]), new_kwargs


def carry_of(
    module: nn.Module | nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The carry of a cell, `carry=` or the first of two arguments; None for others."""
    if not isinstance(module, (nn.RNNCellBase, nnx.RNNCellBase)):
        return None
    if "carry" in kwargs:
        return kwargs["carry"]
    return args[0] if args and len(args) + len(kwargs) > 1 else None


def cast_carry(carry: Any, output: Any, dtype: np.dtype) -> Any:
    """Casts the result of a cell, and its new carry to the dtypes of the old one.

    A scan over the cell needs the same types at both ends of its body. Without a carry
    everything is cast.
    """
    if carry is None or not _is_pair(output):
        return cast_output(output, dtype)
    new, result = output
    if jax.tree.structure(new) == jax.tree.structure(carry):
        new = jax.tree.map(_tree.like, new, carry)
    return new, cast_output(result, dtype)


def show_result(carry: Any, output: Any, dtype: np.dtype) -> Any:
    """Shows a half result in a wider dtype to the code around, but not a new carry."""
    if carry is None or not _is_pair(output):
        return shown(output, dtype)
    return output[0], shown(output[1], dtype)


def _is_pair(output: Any) -> bool:
    return isinstance(output, tuple) and len(output) == 2


def as_table(x: jax.Array) -> jax.Array:
    """A table to look rows up in: float32, so that a row's gradients add up in it.

    In half, the gradient of a frequent row stops growing at 256 or 2048.
    """
    return x.astype(jnp.float32) if x.dtype in _tree.HALF else x
