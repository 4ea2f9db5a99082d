"""The dtypes in which gradients may be summed over devices."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp.errors import ReduceDtypeError
from jaxmp.policy.reduce_dtype import read_sum_dtype

FLOAT16 = jnp.dtype(jnp.float16)
SUMS = "float32, bfloat16, float16 and float64"


def read_unscaled_dtype(dtype: Any, *, scaled: bool, repair: str) -> np.dtype:
    """Reads a dtype, and refuses float16 for gradients that are not scaled.

    float16 has no numbers below 6e-8, and true gradients are that small. bfloat16 and
    float32 hold them.

    Args:
      dtype: a dtype, scalar type or name.
      scaled: whether the gradients travel multiplied by a loss scale.
      repair: what to write instead, for float16.

    Raises:
      ReduceDtypeError: if it is not a floating dtype of 16 bits or more, or is float16
        for gradients that are not scaled.
    """
    read = read_sum_dtype(dtype)
    if read is None:
        raise ReduceDtypeError(
            f"Gradients cannot be summed over devices in {dtype!r}. Use one of: {SUMS}."
        )
    if read == FLOAT16 and not scaled:
        raise ReduceDtypeError(
            "Gradients would be summed over devices in float16 without a loss scale, "
            f"and those below 6e-8 would become zero. {repair}"
        )
    return read
