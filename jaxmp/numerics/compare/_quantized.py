"""`QuantizedMatmuls`: what each matmul in float8 or int8 adds to the error by itself.

    x --> quantize --> values, scales --> scaled_dot --> x @ w + what rounding adds

That is the distance to the product of the operands before they were rounded. What came
with the operands is in both, and does not count.
"""

import math
import weakref
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp._jaxpr.matmuls import QUANTIZE, dimension_numbers, operands
from jaxmp._jaxpr.primitives import SCALED_DOT
from jaxmp._jaxpr.types import Array, Arrays, Eqn
from jaxmp.numerics.compare._distance import Distance
from jaxmp.numerics.ranges._formats import usual_rounding
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._site import ReplaySite
from jaxmp.quantization.scales import Quantized


class QuantizedMatmuls:
    """Measures quantised matmuls while a program runs.

    Attributes:
      found: for each, how far it is from the product of the unrounded operands.
    """

    def __init__(self) -> None:
        self.found: dict[ReplaySite, Distance] = {}
        self._unrounded: dict[int, tuple[Any, Array]] = {}

    def look(self, site: ReplaySite, given: Arrays, results: Arrays) -> None:
        """Looks at an operation of the program; it wants to see them all."""
        if site.primitive == QUANTIZE:
            self._remember(given[-1], results[0])
        elif site.primitive == SCALED_DOT:
            lhs, rhs = (self._read(*given[i : i + 2]) for i in (0, 2))
            numbers = dimension_numbers(site.eqn)
            exact = jax.lax.dot_general(lhs, rhs, numbers, precision="highest")
            self.found.setdefault(site, Distance()).add(exact, results[0])

    def _remember(self, array: Array, values: Array) -> None:
        """Keeps an array as long as its rounded values live."""
        key = id(values)
        ref = weakref.ref(values, lambda _: self._unrounded.pop(key, None))
        self._unrounded[key] = ref, array

    def _read(self, values: Array, inverse: Array) -> Array:
        """An operand before it was rounded.

        What another loop has stacked was not seen, and is taken as it was rounded.
        """
        ref, array = self._unrounded.get(id(values), (lambda: None, None))
        if ref() is not values:
            return Quantized(values, inverse).in_dtype(jnp.float32)
        return jnp.asarray(array, jnp.float32)


class Measuring(Interpreter):
    """Runs a program and measures its quantised matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls = QuantizedMatmuls()

    def observe(self, site: ReplaySite, operands: Arrays, results: Arrays) -> None:
        self.matmuls.look(site, operands, results)


def usual_error(eqn: Eqn) -> float:
    """The relative error that a quantised matmul of normal numbers adds by itself."""
    return math.hypot(*(usual_rounding(x.dtype) for x in operands(eqn)))


def formats(eqn: Eqn) -> str:
    """What a quantised matmul multiplies, such as `"float8_e4m3fn"`."""
    return " and ".join(dict.fromkeys(str(x.dtype) for x in operands(eqn)))
