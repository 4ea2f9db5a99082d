"""Matmuls whose weights get their gradients in float32.

Devices add a gradient up in the dtype in which it leaves its matmul, and a cast behind
the matmul comes after the sum. So a weight enters a matmul twice: in half, which is
multiplied, and as it is stored, which gets the gradient. The cast between the two
stands outside, where compilers see that one gathered copy in half serves all readers.

The tangent of a stored weight has a primitive of its own, whose transposition is the
matmul that returns float32. So every transformation of JAX works, forward-mode
derivatives included.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxmp._jaxpr.execution import bind, evaluate
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp._jaxpr.types import Array, Eqn
from jaxmp.casting.plan.states import FLOAT32
from jaxmp.casting.run._wide_matmul import multiply_wide


class Weight(NamedTuple):
    """A weight where it is stored.

    Attributes:
      value: the array.
      move: brings it, or its tangent, to where it is multiplied. A gradient goes the
        same way back.
    """

    value: Array
    move: Callable[[Array], Array] = lambda x: x

    def then(self, move: Callable[[Array], Array]) -> "Weight":
        """The same weight, moved further."""
        return Weight(self.value, lambda x: move(self.move(x)))


def multiply(
    matmul: Primitive,
    params: Mapping[str, Any],
    operands: Sequence[Array],
    weights: Mapping[int, Weight],
) -> Array:
    """A matmul or convolution of half operands.

    Args:
      matmul: its primitive.
      params: its parameters.
      operands: in half; behind the first two, what has no gradient.
      weights: by their position among the operands. They get the gradients of these
        operands, summed in float32.
    """
    stored = {i: weight.value for i, weight in weights.items()}

    def matmul_in_half(operands: Sequence[Array], stored: Mapping[int, Array]) -> Array:
        return matmul.bind(*operands, **params)

    run = jax.custom_jvp(matmul_in_half)

    @functools.partial(run.defjvp, symbolic_zeros=True)
    def rule(primals: Any, tangents: Any) -> tuple[Array, Array]:
        operands, stored = primals
        terms = []
        for i in (0, 1):
            tangent = tangents[1][i] if i in weights else tangents[0][i]
            if isinstance(tangent, SymbolicZero):
                continue
            if i in weights:
                tangent = weights[i].move(tangent)
                others = [x for k, x in enumerate(operands) if k != i]
                args = (others[0], tangent, *others[1:])
                terms.append(_tangent.bind(*args, matmul=matmul, position=i, **params))
            else:
                terms.append(matmul.bind(*_put(operands, i, tangent), **params))
        # Bound by itself: the policies of jax.checkpoint know a matmul by its name.
        out = matmul_in_half(operands, stored)
        tangent = functools.reduce(jax.numpy.add, terms) if terms else out * 0
        return out, tangent

    return run(tuple(operands), stored)


def _put(values: Sequence[Array], position: int, value: Array) -> list[Array]:
    return [value if i == position else x for i, x in enumerate(values)]


_tangent = Primitive("matmul_of_wide_tangent")
"""Multiplies `(other, tangent, *rest)`: the tangent of a stored weight, cast to the
dtype of the other operand. Linear in both."""


def _operands(
    other: Any, weight: Any, rest: Sequence[Any], position: int
) -> tuple[Any, ...]:
    return (weight, other, *rest) if position == 0 else (other, weight, *rest)


def _multiply_narrow(
    other: Array,
    weight: Array,
    *rest: Array,
    matmul: Primitive,
    position: int,
    **params: Any,
) -> Array:
    narrow = jax.lax.convert_element_type(weight, other.dtype)
    return matmul.bind(*_operands(other, narrow, rest, position), **params)


def _abstract_eval(
    other: Any, weight: Any, *rest: Any, matmul: Any, position: int, **params: Any
) -> Any:
    narrow = weight.update(dtype=other.dtype, weak_type=False)
    operands = _operands(other, narrow, rest, position)
    result = matmul.abstract_eval(*operands, **params)
    return result[0] if isinstance(result, tuple) else result


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    terms = [
        _tangent.bind(*_put(primals, i, tangents[i]), **params)
        for i in (0, 1)
        if not isinstance(tangents[i], ad.Zero)
    ]
    return _tangent.bind(*primals, **params), functools.reduce(jax.numpy.add, terms)


def _transpose(
    cotangent: Any,
    other: Any,
    weight: Any,
    *rest: Any,
    matmul: Primitive,
    position: int,
    **params: Any,
) -> list[Any]:
    transpose = ad.primitive_transposes[matmul]
    if ad.is_undefined_primal(weight):
        wide = ad.UndefinedPrimal(weight.aval.update(dtype=FLOAT32))
        params = {**params, "preferred_element_type": FLOAT32}

        def run(cotangent: Array, other: Array, *rest: Array) -> Array:
            operands = _operands(other, wide, rest, position)
            return transpose(cotangent, *operands, **params)[position]

        args = (cotangent, other, *rest)
        (gradient,) = evaluate(jax.make_jaxpr(run)(*args), args, _bind_wide)
        gradient = jax.lax.convert_element_type(gradient, weight.aval.dtype)
        return [None, gradient, *(None for _ in rest)]
    narrow = jax.lax.convert_element_type(weight, other.aval.dtype)
    operands = _operands(other, narrow, rest, position)
    gradient = transpose(cotangent, *operands, **params)[1 - position]
    return [gradient, None, *(None for _ in rest)]


def _bind_wide(eqn: Eqn, operands: Sequence[Array]) -> list[Array]:
    if eqn.primitive.name in MATMULS:
        return [multiply_wide(eqn.primitive, eqn.params, operands)]
    return bind(eqn, operands)


def _batch(
    args: Sequence[Any],
    axes: Sequence[Any],
    *,
    matmul: Primitive,
    position: int,
    **params: Any,
) -> tuple[Any, int]:
    """Batches the matmul as JAX does, and puts the tangent into the one it finds."""
    other, weight, *rest = args

    def run(other: Array, weight: Array, *rest: Array) -> Array:
        return matmul.bind(*_operands(other, weight, rest, position), **params)

    def bind_tangent(eqn: Eqn, operands: Sequence[Array]) -> list[Array]:
        if eqn.primitive is not matmul:
            return bind(eqn, operands)
        weight, other = operands[position], operands[1 - position]
        settings = {"matmul": matmul, "position": position, **eqn.params}
        return [_tangent.bind(other, weight, *operands[2:], **settings)]

    narrow = jax.lax.convert_element_type(weight, other.dtype)
    batched = jax.vmap(run, in_axes=tuple(axes))
    jaxpr = jax.make_jaxpr(batched)(other, narrow, *rest)
    (out,) = evaluate(jaxpr, args, bind_tangent)
    return out, 0


_tangent.def_impl(_multiply_narrow)
_tangent.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[_tangent] = _jvp
ad.primitive_transposes[_tangent] = _transpose
batching.primitive_batchers[_tangent] = _batch
_lower: Any = mlir.lower_fun(_multiply_narrow, multiple_results=False)
mlir.register_lowering(_tangent, _lower)
