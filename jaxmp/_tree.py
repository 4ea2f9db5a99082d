"""Casts, selects and finiteness of the leaves of a pytree.

A cast touches only arrays of float16, bfloat16 and float32. Integers, booleans, PRNG
keys, float0, complex, float8, float64 arrays of JAX, `None` and Python scalars pass
unchanged.
"""

import functools
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")
PyTree = Any

FLOAT32 = jnp.dtype(jnp.float32)
HALF = frozenset(map(jnp.dtype, (jnp.float16, jnp.bfloat16)))
CASTABLE = HALF | {FLOAT32}
NUMPY = (np.ndarray, np.generic)
SCALARS = (bool, int, float, complex)


def is_array(x: Any) -> bool:
    """True for arrays and array scalars of JAX and NumPy; False for float0."""
    return isinstance(x, (jax.Array, *NUMPY)) and x.dtype != jax.dtypes.float0


def is_inexact(x: Any) -> bool:
    """True for arrays of a real or complex floating dtype."""
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def is_castable(x: Any) -> bool:
    """True for arrays of float16, bfloat16 and float32."""
    return is_array(x) and x.dtype in CASTABLE


def is_half(x: Any) -> bool:
    """True for arrays of float16 and bfloat16."""
    return is_array(x) and x.dtype in HALF


def path_string(path: tuple[Any, ...]) -> str:
    """Writes a key path of `jax.tree_util` as `"block_0/dense/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def cast_floating(
    tree: T, dtype: jax.typing.DTypeLike, *, also: Iterable[np.dtype] = ()
) -> T:
    """Casts the floating leaves of a tree, abstract ones included.

    Args:
      tree: any pytree. `jax.ShapeDtypeStruct` leaves keep shape and sharding.
      dtype: what float16, bfloat16 and float32 leaves become.
      also: further dtypes to cast, because the user named them.

    Returns:
      A tree of the same structure; a leaf that has the dtype already is not copied.
      NumPy's float64, the default of Python code, is cast, since JAX would read it as
      float32. A float64 array of JAX was made on purpose and is not.
    """
    dtype = jnp.dtype(dtype)
    castable = CASTABLE.union(also)
    castable_in_numpy = castable | {np.dtype(np.float64)}

    def cast(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x.update(dtype=dtype, weak_type=False) if x.dtype in castable else x
        if isinstance(x, jax.Array):
            return x.astype(dtype) if x.dtype in castable else x
        if isinstance(x, NUMPY) and x.dtype.newbyteorder("=") in castable_in_numpy:
            return x.astype(dtype, copy=False)
        return x

    return jax.tree.map(cast, tree)


def at_least_float32(x: Any) -> Any:
    """Widens a float16 or bfloat16 array to float32; anything else passes."""
    return jnp.asarray(x, jnp.float32) if is_half(x) else x


def strong(x: Any) -> Any:
    """Gives a Python scalar or weakly typed array the dtype that JAX would use."""
    if isinstance(x, SCALARS) or is_array(x):
        return jax.lax.convert_element_type(x, jnp.result_type(x))
    return x


def like(x: Any, reference: Any) -> Any:
    """Casts an array to the strong dtype of `reference`; anything else passes."""
    if not (is_array(x) and is_array(reference)):
        return x
    if jnp.issubdtype(reference.dtype, jax.dtypes.extended):
        return x
    return jax.lax.convert_element_type(x, reference.dtype)


def negative_zero(x: Any) -> Any:
    """The update that changes no number: p + 0.0 would lose the sign of a -0.0."""
    if not is_array(x):
        return x
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.full_like(x, complex(-0.0, -0.0))
    return jnp.full_like(x, -0.0) if is_inexact(x) else jnp.zeros_like(x)


def all_finite(tree: PyTree) -> jax.Array:
    """Returns whether every element of every floating leaf is finite.

    Each element is checked by itself: values whose sum or norm would overflow are still
    finite. Leaves that cannot be infinite (integers, booleans, keys, `None`) are
    skipped.

    Args:
      tree: any pytree; a Python float counts as a scalar.

    Returns:
      A boolean scalar array, True for a tree without floating leaves.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> bool(jaxmp.all_finite({"w": jnp.ones(2), "step": jnp.int32(3)}))
      True
      >>> bool(jaxmp.all_finite({"w": jnp.array([1.0, jnp.inf])}))
      False
    """
    # A float32 sum, not `jnp.all`: XLA fuses it with the sum of squares of a norm into
    # one pass over the array. A reduction of booleans would take a pass of its own.
    leaves = [
        x
        for x in jax.tree.leaves(tree)
        if is_inexact(x) or isinstance(x, (float, complex))
    ]
    nonfinite = [(~jnp.isfinite(x)).astype(jnp.float32).sum() for x in leaves]
    count = functools.reduce(operator.add, nonfinite, jnp.float32(0))
    # XLA repeats a cheap sum of scalars in every fusion that reads it (on the CPU, one
    # per leaf), but computes a square root only once.
    return jnp.sqrt(count) == 0


def select(pred: jax.Array, on_true: T, on_false: T) -> T:
    """Takes one of two trees; a NaN or infinity in the other one cannot leak."""

    def select_leaf(x: Any, y: Any) -> Any:
        if not all(is_array(z) or isinstance(z, SCALARS) for z in (x, y)):
            return x
        x, y = jnp.asarray(x), jnp.asarray(y)
        if x.dtype == jnp.uint16:
            # The TPU compiler gives a select of integers its own kernel, and computes
            # the operands a second time there.
            wide = jax.lax.select(pred, x.astype(jnp.float32), y.astype(jnp.float32))
            return wide.astype(x.dtype)
        return jax.lax.select(pred, x, y)

    return jax.tree.map(select_leaf, on_true, on_false)
