"""The dtype in which gradients are summed over devices, checked against its policy."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp.errors import PolicyError
from jaxmp.policy.dtypes import name_to_dtype, read_dtype


def read_reduce_dtype(given: Any, compute: np.dtype) -> np.dtype:
    """Reads the reduce dtype of a policy.

    Args:
      given: a dtype, scalar type or name.
      compute: the compute dtype of the same policy.

    Returns:
      The dtype.

    Raises:
      PolicyError: if it is no floating dtype, or neither the compute dtype nor, for a
        half compute dtype, float32.
    """
    dtype = read_dtype(given)
    if dtype is None:
        raise PolicyError(
            f"Unknown dtype {given!r} as reduce_dtype of a policy. "
            f"Write one of: half, {', '.join(name_to_dtype)}."
        )
    compute = jnp.dtype(compute)
    if dtype == compute or (compute in _tree.HALF and dtype == _tree.FLOAT32):
        return dtype
    reason = _why_not(dtype, compute)
    repair = "reduce=float32, or leave reduce out"
    if compute not in _tree.HALF:
        repair = f"reduce={compute}, or leave reduce out"
    raise PolicyError(
        f"reduce_dtype={dtype} does not fit compute_dtype={compute}: {reason}. Write "
        f"{repair}."
    )


def read_sum_dtype(given: Any) -> np.dtype | None:
    """Reads a dtype in which devices can add gradients up; None for anything else.

    Args:
      given: a dtype, scalar type or name.
    """
    dtype = read_dtype(given)
    return None if dtype is None or dtype.itemsize < 2 else dtype


def is_wider(reduce: np.dtype | None, compute: np.dtype) -> bool:
    """Whether gradients are to be wider than what the matmuls compute.

    Args:
      reduce: the reduce dtype of a policy.
      compute: the compute dtype of the same policy.
    """
    return reduce == _tree.FLOAT32 and jnp.dtype(compute) in _tree.HALF


def _why_not(dtype: np.dtype, compute: np.dtype) -> str:
    if dtype == jnp.float16 and compute != jnp.float16:
        return "float16 needs a loss scale, which only float16 computation has"
    has, needs = jnp.finfo(dtype), jnp.finfo(compute)
    if has.nmant < needs.nmant or has.maxexp < needs.maxexp:
        return "it is narrower, and would round what the matmuls computed"
    return "no matmul returns so wide a sum of such operands"
