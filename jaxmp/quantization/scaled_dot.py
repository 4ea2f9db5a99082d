"""`scaled_dot`: a matmul of two quantised operands, in the form that a platform needs.

A float8 dot in a program is no promise of float8 arithmetic. On NVIDIA's GPUs XLA
multiplies it in float16, unless the dot names a float8 algorithm: then it calls
cuBLASLt, which wants the scale behind the dot, in the dtype of the result, to multiply
by it there. It takes one factor. No TPU takes such an algorithm.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.extend.core.primitives import dot_general_p
from jax.interpreters import batching, mlir

from jaxmp._jaxpr.checkpoint_policies import save_as
from jaxmp._jaxpr.execution import result_avals
from jaxmp._jaxpr.primitives import SCALED_DOT
from jaxmp._jaxpr.types import Array
from jaxmp.quantization._batching import DimensionNumbers, all_at_front, batched
from jaxmp.quantization.scales import Quantized

_ALGORITHM = jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32
_FAST_ALGORITHM = jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM


def scaled_dot(
    lhs: Quantized,
    rhs: Quantized,
    dimension_numbers: DimensionNumbers,
    dtype: np.dtype,
    is_fast: bool,
) -> Array:
    """Multiplies two quantised arrays.

    Args:
      lhs, rhs: the operands.
      dimension_numbers: as of `jax.lax.dot_general`.
      dtype: of the result: float32, or half. It is added up in float32, or int32.
      is_fast: whether NVIDIA's GPUs may add up with fewer bits, as their Tensor Cores
        do fastest.
    """
    return _scaled_dot.bind(
        *lhs,
        *rhs,
        dimension_numbers=dimension_numbers,
        dtype=dtype,
        is_fast=is_fast,
    )


def _multiply(
    lhs: Array,
    lhs_inverse: Array,
    rhs: Array,
    rhs_inverse: Array,
    *,
    dimension_numbers: DimensionNumbers,
    dtype: np.dtype,
    is_fast: bool,
    on_cuda: bool = False,
) -> Array:
    is_float = jnp.issubdtype(lhs.dtype, jnp.floating)
    is_scalar = lhs_inverse.size == rhs_inverse.size == 1
    accumulator = jnp.dtype(jnp.float32 if is_float else jnp.int32)
    algorithm = None
    if on_cuda and is_float:
        algorithm = _FAST_ALGORITHM if is_fast else _ALGORITHM
        if is_scalar and dtype == jnp.bfloat16:
            # bfloat16 holds whatever float32 does, so that it can be scaled after it is
            # rounded, by cuBLASLt in the same call or where it is read.
            accumulator = dtype
    out = jax.lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        precision=algorithm,
        preferred_element_type=accumulator,
    )
    if not is_float:
        out = out.astype(jnp.float32)
    if is_scalar and (is_fast or not on_cuda):
        # Forward, cuBLASLt adds the bias, too, and stores no product without it.
        scale = lhs_inverse.reshape(()) * rhs_inverse.reshape(())
        return (out * scale.astype(out.dtype)).astype(dtype)
    # Backward, a fusion that reads the result takes two factors and needs no product.
    out = out.astype(jnp.float32)
    for scale in _along_result(lhs_inverse, rhs_inverse, dimension_numbers):
        out = out * scale
    return out.astype(dtype)


def _along_result(
    lhs: Array, rhs: Array, dimension_numbers: DimensionNumbers
) -> tuple[Array, Array]:
    """The inverses of scales, laid out as the result is."""
    contract, batch = dimension_numbers
    free = [
        [i for i in range(x.ndim) if i not in (*contract[side], *batch[side])]
        for side, x in enumerate((lhs, rhs))
    ]

    def laid_out(x: Array, side: int) -> Array:
        order = (*batch[side], *free[side], *contract[side])
        shape = [x.shape[i] for i in batch[side]]
        own = [x.shape[i] for i in free[side]]
        ones = [1] * len(free[1 - side])
        shape += own + ones if side == 0 else ones + own
        return x.transpose(order).reshape(shape)

    return laid_out(lhs, 0), laid_out(rhs, 1)


def _abstract_eval(
    lhs: Any,
    lhs_inverse: Any,
    rhs: Any,
    rhs_inverse: Any,
    *,
    dimension_numbers: DimensionNumbers,
    dtype: np.dtype,
    is_fast: bool,
) -> Any:
    del lhs_inverse, rhs_inverse, is_fast
    params = dot_params(dimension_numbers, jnp.dtype(jnp.float32))
    (result,) = result_avals(dot_general_p, (lhs, rhs), params)
    return result.update(dtype=dtype)


def dot_params(dimension_numbers: DimensionNumbers, dtype: np.dtype) -> dict[str, Any]:
    """The parameters of an ordinary `dot_general`."""
    return {
        "dimension_numbers": dimension_numbers,
        "precision": None,
        "preferred_element_type": dtype,
        "out_sharding": None,
    }


def _batch(
    args: Sequence[Any],
    axes: Sequence[Any],
    *,
    dimension_numbers: DimensionNumbers,
    **params: Any,
) -> tuple[Any, int]:
    (lhs, lhs_has), (rhs, rhs_has) = (
        all_at_front(args[side], axes[side]) for side in (slice(2), slice(2, 4))
    )
    rank = lhs[0].ndim - lhs_has
    numbers, axis = batched(dimension_numbers, (lhs_has, rhs_has), rank)
    out = _scaled_dot.bind(*lhs, *rhs, dimension_numbers=numbers, **params)
    return out, axis


_scaled_dot = Primitive(SCALED_DOT)


@functools.lru_cache(maxsize=1024)
def _compiled(**params: Any) -> Callable[..., Array]:
    return jax.jit(functools.partial(_scaled_dot.bind, **params))


def _matmul_of(
    lhs: Any, lhs_inverse: Any, rhs: Any, rhs_inverse: Any, **params: Any
) -> tuple[Any, tuple[Any, Any], dict[str, Any]]:
    """The matmul that it stands for, as the policies of `jax.checkpoint` know it."""
    del lhs_inverse, rhs_inverse
    numbers, dtype = params["dimension_numbers"], params["dtype"]
    return dot_general_p, (lhs, rhs), dot_params(numbers, dtype)


_scaled_dot.def_impl(lambda *args, **params: _compiled(**params)(*args))
_scaled_dot.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[_scaled_dot] = _batch
_lower: Any = mlir.lower_fun(_multiply, multiple_results=False)
mlir.register_lowering(_scaled_dot, _lower)
_multiply_on_cuda = functools.partial(_multiply, on_cuda=True)
_lower_on_cuda: Any = mlir.lower_fun(_multiply_on_cuda, multiple_results=False)
mlir.register_lowering(_scaled_dot, _lower_on_cuda, platform="cuda")
save_as(_scaled_dot, _matmul_of)
