"""How much arithmetic a matmul or a convolution is."""

import math
from typing import Any, NamedTuple

from jaxmp._jaxpr.matmuls import dimension_numbers, operands
from jaxmp._jaxpr.types import Eqn


class MatmulShape(NamedTuple):
    """A matmul of `(m, k)` by `(k, n)`, made `batch` times.

    A convolution has the positions of its output for `m`, the features of its output
    for `n`, and for `k` the features of its input, `taps` times over.
    """

    batch: int
    m: int
    n: int
    k: int
    taps: int = 1

    @property
    def flops(self) -> int:
        """Multiplications and additions, as the textbook counts them: 2 m n k."""
        return 2 * self.batch * self.m * self.n * self.k * self.taps

    def __str__(self) -> str:
        batch = f"{self.batch} of " if self.batch > 1 else ""
        taps = f" x {self.taps} taps" if self.taps > 1 else ""
        return f"{batch}({self.m}, {self.k}) @ ({self.k}, {self.n}){taps}"


def matmul_shape(eqn: Eqn) -> MatmulShape:
    """The shape of a matmul or convolution.

    Args:
      eqn: an equation of one of the primitives in `ALL_MATMULS`.

    Returns:
      Its shape. Of a convolution over an input with holes, as in a gradient of a
      strided one, what is multiplied by the zeros in the holes is left out; what falls
      on padding is not.
    """
    if eqn.primitive.name == "ragged_dot_general":
        return _ragged_dot(eqn)
    if eqn.primitive.name == "conv_general_dilated":
        return _convolution(eqn)
    return _dot(eqn)


def _dot(eqn: Eqn) -> MatmulShape:
    lhs, rhs = operands(eqn)
    (contracted, _), (batched, _) = dimension_numbers(eqn)
    k = _sizes(lhs, contracted)
    batch = _sizes(lhs, batched)
    return MatmulShape(batch, _over(lhs.size, k, batch), _over(rhs.size, k, batch), k)


def _ragged_dot(eqn: Eqn) -> MatmulShape:
    """Each row of the left side meets the matrix of one group."""
    lhs, rhs, groups = (v.aval for v in eqn.invars[:3])
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), (batched, _) = dims.dot_dimension_numbers
    k = _sizes(lhs, contracted)
    batch = _sizes(lhs, batched)
    rhs_size = rhs.size
    if dims.rhs_group_dimensions:
        rhs_size = _over(rhs_size, groups.shape[-1])
    return MatmulShape(batch, _over(lhs.size, k, batch), _over(rhs_size, k, batch), k)


def _convolution(eqn: Eqn) -> MatmulShape:
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    dims = eqn.params["dimension_numbers"]
    features, per_group = (kernel.shape[i] for i in dims.rhs_spec[:2])
    holes = math.prod(eqn.params["lhs_dilation"])
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    taps = _sizes(kernel, dims.rhs_spec[2:])
    m = _over(out.size, out.shape[dims.out_spec[1]])
    # The taps that fall into holes cost nothing.
    m, taps = (m // holes, taps) if m % holes == 0 else (m, taps // holes)
    return MatmulShape(groups, m, features // groups, per_group, taps)


def _sizes(aval: Any, axes: Any) -> int:
    return math.prod(aval.shape[axis] for axis in axes)


def _over(size: int, *divisors: int) -> int:
    return size // max(math.prod(divisors), 1)
