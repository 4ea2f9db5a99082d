"""Scales: powers of two that bring an array into the range of a small format.

A power of two changes no digit, so that scaling costs no accuracy, commutes with every
rounding, and a gradient of 2^k times a loss has the digits of the gradient of the loss.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.types import Array
from jaxmp.errors import NoSecondDerivative
from jaxmp.quantization._rounding import round_to_format


class Quantized(NamedTuple):
    """An array in a small format.

    Attributes:
      values: the array over its scale, float8 or int8.
      inverse: float32 powers of two, `values * inverse` is the array: of length 1 along
        every axis that shares one. NaN where a number that shares it is not finite.
    """

    values: Array
    inverse: Array

    def in_dtype(self, dtype: Any) -> Array:
        """The array again, as it was rounded."""
        return (self.values.astype(jnp.float32) * self.inverse).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def quantize(
    x: Array,
    dtype: np.dtype,
    axes: tuple[int, ...] | None,
    is_weight: bool = False,
) -> Quantized:
    """Rounds an array to a small format, under scales that are powers of two.

    Args:
      x: an array in half.
      dtype: float8 or int8.
      axes: what shares a scale; None is the whole array.
      is_weight: whether it is a weight, which is usually cast to half for this.

    Returns:
      The values, rounded to nearest even, and the inverses of the scales.

    Raises:
      NoSecondDerivative: if it is differentiated.
    """
    axes = tuple(range(x.ndim)) if axes is None else axes
    return Quantized(*round_to_format(x, dtype, axes, is_weight))


@quantize.defjvp
def _no_derivative(
    dtype: np.dtype,
    axes: Any,
    is_weight: bool,
    primals: Sequence[Any],
    tangents: Sequence[Any],
) -> Any:
    del axes, is_weight, primals, tangents
    raise NoSecondDerivative(
        f"A matmul in {dtype.name} was differentiated twice, as by jax.hessian, or by "
        "a gradient of a gradient. Its derivative is made of rounded operands, which "
        "have no derivative. Compute this part under a half policy, such as "
        "jaxmp.autocast(fn, 'mixed_bfloat16'), or keep its matmuls in half by a rule: "
        "OpRule(path=..., quantize='none')."
    )
