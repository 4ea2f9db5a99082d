"""Quantised matmuls in NumPy: what jaxmp computes, written a second time."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.types import Eqn
from jaxmp.quantization.recipe import (
    ACTIVATION,
    COTANGENT,
    WEIGHT,
    Recipe,
    Role,
    recipe_of,
)

SMALLEST = 2.0**-100


def largest_number(dtype: Any) -> float:
    is_int = jnp.issubdtype(dtype, jnp.integer)
    return float(jnp.iinfo(dtype).max if is_int else jnp.finfo(dtype).max)


def quantized(x: Any, dtype: Any, axes: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a finite array under the largest power of two that keeps it in range.

    Args:
      x: an array.
      dtype: float8 or int8.
      axes: what shares a scale.

    Returns:
      The values, and the float64 inverses of the scales.
    """
    exact = np.asarray(x).astype(np.float64)
    largest = np.max(np.abs(exact), axis=tuple(axes), keepdims=True, initial=SMALLEST)
    exponent = np.floor(np.log2(largest_number(dtype) / largest))
    exponent -= largest * 2.0**exponent > largest_number(dtype)
    exponent += largest * 2.0 ** (exponent + 1) <= largest_number(dtype)
    scaled = exact * 2.0**exponent
    if jnp.issubdtype(dtype, jnp.integer):
        scaled = np.rint(scaled)
    return scaled.astype(np.float32).astype(dtype), 2.0**-exponent


class Product(NamedTuple):
    """A matmul, its axes named by letters as in `einsum`.

    Attributes:
      lhs, rhs: of the operands.
      out: of the result, as `dot_general` orders it: batch, left, right.
    """

    lhs: str
    rhs: str
    out: str

    @property
    def batch(self) -> str:
        return "".join(c for c in self.out if c in self.lhs and c in self.rhs)

    @property
    def contracted(self) -> str:
        return "".join(c for c in self.lhs if c in self.rhs and c not in self.out)

    @property
    def dimension_numbers(self) -> Any:
        def axes(letters: str) -> Any:
            return tuple(tuple(map(x.index, letters)) for x in (self.lhs, self.rhs))

        return axes(self.contracted), axes(self.batch)

    def __str__(self) -> str:
        return f"{self.lhs},{self.rhs}->{self.out}"

    def operand(self, x: Any, letters: str, recipe: Recipe, role: Role) -> np.ndarray:
        """An operand as it is multiplied, in float64."""
        shared = self.contracted if recipe.per_row else set(letters) - set(self.batch)
        axes = [letters.index(c) for c in shared]
        values, inverse = quantized(x, recipe.format_of(role), axes)
        return values.astype(np.float64) * inverse

    def exactly(
        self, lhs: Any, rhs: Any, recipe: Recipe, roles: tuple[Role, Role]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The product of rounded operands, and that of their magnitudes."""
        if recipe.leaves_in_half(roles):
            operands = [np.asarray(x).astype(np.float64) for x in (lhs, rhs)]
        else:
            operands = [
                self.operand(x, letters, recipe, role)
                for x, letters, role in zip((lhs, rhs), self[:2], roles, strict=True)
            ]
        return np.einsum(str(self), *operands), np.einsum(
            str(self), *map(np.abs, operands)
        )

    def and_gradients(
        self, lhs: Any, rhs: Any, cotangent: Any, name: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `exactly`, of the product of an activation and a weight, and of its two
        gradients."""
        recipe = recipe_of(name)
        to_lhs = Product(self.out, self.rhs, self.lhs)
        to_rhs = Product(self.lhs, self.out, self.rhs)
        return [
            self.exactly(lhs, rhs, recipe, (ACTIVATION, WEIGHT)),
            to_lhs.exactly(cotangent, rhs, recipe, (COTANGENT, WEIGHT)),
            to_rhs.exactly(lhs, cotangent, recipe, (ACTIVATION, COTANGENT)),
        ]


def assert_is_rounded(
    actual: Any, expected: tuple[np.ndarray, np.ndarray], terms: int = 512
) -> None:
    """Asserts that a result is an exact one, but for sums in float32 and its dtype.

    Args:
      actual: the result.
      expected: what it is in float64, and the product of the magnitudes.
      terms: at least as many as are added up.
    """
    exact, magnitude = expected
    dtype = jnp.dtype(actual.dtype)
    rounding = 0.0 if dtype == np.float32 else float(jnp.finfo(dtype).eps) / 2
    bound = terms * 2.0**-24 * magnitude + rounding * np.abs(exact)
    assert actual.shape == exact.shape
    assert np.all(np.abs(np.asarray(actual).astype(np.float64) - exact) <= bound)


def small_operands(eqn: Eqn) -> list[np.dtype]:
    """The formats of the operands of an equation that are no wider than a byte."""
    dtypes = (np.dtype(v.aval.dtype) for v in eqn.invars if hasattr(v.aval, "dtype"))
    return [dtype for dtype in dtypes if dtype.itemsize == 1]


def is_quantized_matmul(eqn: Eqn) -> bool:
    """Whether an equation multiplies two operands in a small format."""
    return eqn.primitive.name == "scaled_dot"
