"""The quantised matmul: forward, and the two matmuls that make its gradients.

Its tangents are ordinary matmuls in half, so that forward-mode derivatives are as those
of a matmul in half. It is the transposition of a tangent, a cotangent times the other
operand, that is quantised again. So every transformation of JAX works, and one step is
multiplied in the small format three times: forward, for the gradient of the activation,
and for that of the weight.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.extend.core.primitives import dot_general_p
from jax.interpreters import ad, batching, mlir

from jaxmp._jaxpr.execution import result_avals
from jaxmp._jaxpr.primitives import MATMUL_OF_TANGENT
from jaxmp._jaxpr.types import Array
from jaxmp.quantization._batching import DimensionNumbers, all_at_front, batched
from jaxmp.quantization.recipe import ACTIVATION, COTANGENT, WEIGHT, Recipe, Role
from jaxmp.quantization.scaled_dot import dot_params, scaled_dot
from jaxmp.quantization.scales import Quantized, quantize


class _Matmul(NamedTuple):
    """What one matmul is.

    Attributes:
      recipe: how it is quantised.
      roles: what its operands are.
      dimension_numbers: as of `jax.lax.dot_general`.
      dtype: of the result: half, or float32 for the gradient of a weight.
    """

    recipe: Recipe
    roles: tuple[Role, Role]
    dimension_numbers: DimensionNumbers
    dtype: np.dtype

    def quantize(self, x: Array, side: int) -> Quantized:
        """An operand in its format."""
        contract, batch = (pair[side] for pair in self.dimension_numbers)
        free = (i for i in range(x.ndim) if i not in batch)
        axes = tuple(contract) if self.recipe.per_row else tuple(free)
        role = self.roles[side]
        return quantize(x, self.recipe.format_of(role), axes, role == WEIGHT)

    def of(self, lhs: Quantized, rhs: Quantized) -> Array:
        """The result of quantised operands."""
        is_fast = COTANGENT not in self.roles
        return scaled_dot(lhs, rhs, self.dimension_numbers, self.dtype, is_fast)

    def in_half(self, lhs: Array, rhs: Array) -> Array:
        """The result of operands in half."""
        params = dot_params(self.dimension_numbers, self.dtype)
        return dot_general_p.bind(lhs, rhs, **params)


def multiply(
    lhs: Array,
    rhs: Array,
    dimension_numbers: DimensionNumbers,
    recipe: Recipe,
    roles: tuple[Role, Role],
    stored: Mapping[int, Any] | None = None,
    dtype: np.dtype | None = None,
) -> Array:
    """Multiplies two arrays in the small format of a recipe.

    Args:
      lhs, rhs: in half.
      dimension_numbers: as of `jax.lax.dot_general`, without batch axes.
      recipe: the format, and how scales are shared.
      roles: what the operands are.
      stored: the weights where they are stored, by position: `value`, the array, gets
        the gradient in its dtype, and `move` brings its tangent to where it is
        multiplied.
      dtype: of the result; that of the operands by default. It is added up in float32.

    Returns:
      The product. Where an operand is not finite, neither is what it takes part in.

    Raises:
      NoSecondDerivative: if it is differentiated twice.
    """
    weights = dict(stored or {})
    matmul = _Matmul(recipe, roles, dimension_numbers, dtype or jnp.result_type(lhs))
    if recipe.leaves_in_half(roles):
        return matmul.in_half(lhs, rhs)

    @jax.custom_jvp
    def run(operands: tuple[Array, Array], values: Mapping[int, Array]) -> Array:
        del values
        return matmul.of(*map(matmul.quantize, operands, (0, 1)))

    def rule(primals: Any, tangents: Any) -> tuple[Array, Array]:
        operands, _ = primals
        quantized = [*map(matmul.quantize, operands, (0, 1))]
        terms = []
        for i in (0, 1):
            is_stored = i in weights
            tangent = tangents[1][i] if is_stored else tangents[0][i]
            if isinstance(tangent, SymbolicZero):
                continue
            tangent = weights[i].move(tangent) if is_stored else tangent
            other = operands[1 - i], quantized[1 - i]
            terms.append(_times_tangent(matmul, *other, tangent, i))
        out = matmul.of(*quantized)
        return out, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(out)

    run.defjvp(rule, symbolic_zeros=True)
    return run((lhs, rhs), {i: weight.value for i, weight in weights.items()})


def _times_tangent(
    matmul: _Matmul, other: Array, quantized: Quantized, tangent: Array, position: int
) -> Array:
    """Multiplies the tangent of the operand at a position by the other operand.

    What it gets is what a backward pass keeps. One scale for the whole array serves the
    backward pass too; scales per row do not, because other axes are added up there.
    """
    kept = (other,) if matmul.recipe.per_row else quantized
    return _tangent.bind(
        *kept, tangent, matmul=matmul, position=position, half=jnp.result_type(other)
    )


_tangent = Primitive(MATMUL_OF_TANGENT)
"""Multiplies `(*kept, tangent)`: the tangent of one operand, cast to half, by the other
one, which is kept in half, or as values and inverse scales. Linear in the tangent."""


def _ordered(position: int, tangent: Any, other: Any) -> tuple[Any, Any]:
    """Left and right, where the tangent, or its cotangent, has a position."""
    return (tangent, other) if position == 0 else (other, tangent)


def _multiply_in_half(
    *operands: Array, matmul: _Matmul, position: int, half: np.dtype
) -> Array:
    *kept, tangent = operands
    other = kept[0] if len(kept) == 1 else Quantized(*kept).in_dtype(half)
    return matmul.in_half(*_ordered(position, tangent.astype(half), other))


def _abstract_eval(
    *operands: Any, matmul: _Matmul, position: int, half: np.dtype
) -> Any:
    other, tangent = operands[0], operands[-1]
    narrow = tangent.update(dtype=half, weak_type=False)
    avals = _ordered(position, narrow, other.update(dtype=half, weak_type=False))
    params = dot_params(matmul.dimension_numbers, matmul.dtype)
    return result_avals(dot_general_p, avals, params)[0]


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    position: int,
    half: np.dtype,
    **params: Any,
) -> tuple[Any, Any]:
    *kept, tangent = primals
    params = {"half": half, **params}
    terms = []
    if not isinstance(tangents[-1], ad.Zero):
        terms.append(_tangent.bind(*kept, tangents[-1], position=position, **params))
    if not isinstance(tangents[0], ad.Zero):
        # Kept in half: what is kept in a small format has no derivative.
        other = tangent.astype(half), tangents[0]
        terms.append(_tangent.bind(*other, position=1 - position, **params))
    out = _tangent.bind(*primals, position=position, **params)
    return out, functools.reduce(jnp.add, terms)


def _transpose(
    cotangent: Any, *operands: Any, matmul: _Matmul, position: int, half: np.dtype
) -> list[Any]:
    *kept, tangent = operands
    nothing: list[Any] = [None] * len(kept)
    if isinstance(cotangent, ad.Zero):
        return [*nothing, None]
    cotangent = cotangent.astype(half)
    rank = kept[0].ndim
    backward, order = _transposed(matmul, position, rank, tangent.aval)
    added_up = backward.dimension_numbers[0][1 - position]
    if len(kept) > 1 and any(kept[1].shape[axis] > 1 for axis in added_up):
        # The members of a batch, each with a scale of its own, are added up.
        kept = [Quantized(*kept).in_dtype(half)]
    if len(kept) == 1:
        gradient = multiply(
            *_ordered(position, cotangent, kept[0]),
            backward.dimension_numbers,
            backward.recipe,
            backward.roles,
            dtype=backward.dtype,
        )
    else:
        quantized = backward.quantize(cotangent, position), Quantized(*kept)
        gradient = backward.of(*_ordered(position, *quantized))
    return [*nothing, gradient.transpose(order)]


def _transposed(
    matmul: _Matmul, position: int, other_rank: int, aval: Any
) -> tuple[_Matmul, list[int]]:
    """The matmul of a cotangent and the other operand, in the place of the operand.

    Args:
      matmul: the forward one.
      position: of the operand whose gradient is wanted.
      other_rank: the rank of the other operand.
      aval: of the gradient.

    Returns:
      The matmul, and the order in which the axes of its result are those of the
      operand.
    """
    contract, batch = matmul.dimension_numbers
    own, other = position, 1 - position
    ranks = {own: aval.ndim, other: other_rank}
    free = {
        side: [
            i for i in range(ranks[side]) if i not in (*contract[side], *batch[side])
        ]
        for side in (own, other)
    }
    batches = list(range(len(batch[0])))
    start = len(batches) + (len(free[own]) if own == 0 else 0)
    of_other = list(range(start, start + len(free[other])))
    numbers = (
        _ordered(position, tuple(of_other), tuple(free[other])),
        _ordered(position, tuple(batches), tuple(batch[other])),
    )
    by_other = sorted(zip(contract[other], contract[own], strict=True))
    left = _ordered(position, free[own], [axis for _, axis in by_other])
    axes = [*batch[own], *left[0], *left[1]]
    # The gradient of a weight is told by its operands: a cotangent and an activation.
    is_of_weight = matmul.roles[own] == WEIGHT
    kept = ACTIVATION if is_of_weight else matmul.roles[other]
    roles = _ordered(position, COTANGENT, kept)
    backward = matmul._replace(roles=roles, dimension_numbers=numbers, dtype=aval.dtype)
    return backward, [int(i) for i in np.argsort(axes)]


def _batch(
    args: Sequence[Any],
    axes: Sequence[Any],
    *,
    matmul: _Matmul,
    position: int,
    half: np.dtype,
) -> tuple[Any, int]:
    kept, kept_has = all_at_front(args[:-1], axes[:-1])
    (tangent,), tangent_has = all_at_front(args[-1:], axes[-1:])
    lhs, _ = _ordered(position, tangent, kept[0])
    has_axis = _ordered(position, tangent_has, kept_has)
    rank = lhs.ndim - has_axis[0]
    numbers, axis = batched(matmul.dimension_numbers, has_axis, rank)
    matmul = matmul._replace(dimension_numbers=numbers)
    out = _tangent.bind(*kept, tangent, matmul=matmul, position=position, half=half)
    return out, axis


_tangent.def_impl(_multiply_in_half)
_tangent.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[_tangent] = _jvp
ad.primitive_transposes[_tangent] = _transpose
batching.primitive_batchers[_tangent] = _batch
_lower: Any = mlir.lower_fun(_multiply_in_half, multiple_results=False)
mlir.register_lowering(_tangent, _lower)
