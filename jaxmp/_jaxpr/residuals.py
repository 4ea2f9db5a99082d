"""What a function keeps for its backward pass."""

from collections.abc import Callable
from typing import Any

import jax

from jaxmp import _tree
from jaxmp._jaxpr.types import Array


def residual_jaxpr(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A jaxpr that computes what the backward pass of a function needs.

    Args:
      fn: any function.
      args, kwargs: what it is called with; arrays may be `jax.ShapeDtypeStruct`s.

    Returns:
      The jaxpr of a function of the arrays among the arguments; its outputs are the
      residuals, arguments that are kept among them. None if the function cannot be
      differentiated in reverse.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if _is_array(x)]

    def residuals(*arrays: Array) -> list[Array]:
        filled = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        floats = [i for i, x in enumerate(filled) if _tree.is_inexact(x)]

        def outputs(*values: Array) -> list[Array]:
            for i, value in zip(floats, values, strict=True):
                filled[i] = value
            args, kwargs = jax.tree.unflatten(tree, filled)
            outs = jax.tree.leaves(fn(*args, **kwargs))
            return [x for x in outs if _tree.is_inexact(x)]

        outs, pullback = jax.vjp(outputs, *(filled[i] for i in floats))
        jax.eval_shape(pullback, outs)  # A while loop fails no earlier.
        kept = jax.tree.leaves(pullback)
        return [x for x in kept if getattr(x, "dtype", _FLOAT0) != _FLOAT0]

    try:
        return jax.make_jaxpr(residuals)(*(leaves[i] for i in places))
    except (TypeError, ValueError, NotImplementedError, AssertionError):
        return None  # The derivative of a Pallas kernel fails an assertion of JAX's.


_FLOAT0 = jax.dtypes.float0


def _is_array(x: Any) -> bool:
    return _tree.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
