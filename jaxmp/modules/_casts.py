"""Casts at the border of a layer."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree

T = TypeVar("T")


def cast_output(output: T, dtype: np.dtype) -> T:
    """Casts what a layer returns; a scalar is never narrowed.

    A floating scalar among the outputs is a loss, such as a mixture of experts returns
    beside its activations, and saves nothing in half.
    """

    def cast(x):
        is_scalar = _tree.is_array(x) and jnp.ndim(x) == 0
        if is_scalar and x.dtype.itemsize > dtype.itemsize:
            return x
        return _tree.cast_floating(x, dtype)

    return jax.tree.map(cast, output)


def cast_inputs(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: np.dtype, carry: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Casts what a layer is called with, all but the carry, if it has one."""
    new_args, new_kwargs = _tree.cast_floating((args, kwargs), dtype)
    if carry is None:
        return new_args, new_kwargs
    if "carry" in kwargs:
        return new_args, {**new_kwargs, "carry": carry}
    return (carry, *new_args[1:]), new_kwargs


def carry_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the carry that a cell is called with: `carry=` or the first of two."""
    if "carry" in kwargs:
        return kwargs["carry"]
    return args[0] if args and len(args) + len(kwargs) > 1 else None


def cast_carry(carry: Any, output: Any, dtype: np.dtype) -> Any:
    """Casts what a cell returns: the carry to the dtypes of the one that it was given.

    A scan over the cell needs the same types at both ends of its body. Without a carry
    all is cast.
    """
    if carry is None or not (isinstance(output, tuple) and len(output) == 2):
        return cast_output(output, dtype)
    new, result = output
    if jax.tree.structure(new) == jax.tree.structure(carry):
        new = jax.tree.map(_tree.like, new, carry)
    return new, cast_output(result, dtype)
