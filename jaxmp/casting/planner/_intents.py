"""What a program means by how it wrote an operation."""

import jax

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype, is_integer
from jaxmp._jaxpr.jax_functions import is_in_special_function
from jaxmp._jaxpr.primitives import SELECTING
from jaxmp._jaxpr.types import Atom, Eqn
from jaxmp.casting.ops import _registry
from jaxmp.casting.plan.plan import SPECIAL_FUNCTION
from jaxmp.casting.plan.states import FLOAT32

_LOWERABLE = (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGH)


def matmul_intent(eqn: Eqn) -> str | None:
    """Why a matmul keeps the dtypes that it was traced with, or None.

    Integers are exact and take the dtype of the other operand.
    """
    operands = eqn.invars[:2]
    traced = [d for d in map(castable_dtype, operands) if d is not None]
    result = castable_dtype(eqn.outvars[0])
    if result is None or not traced or not all(map(_can_be_float, operands)):
        return "no float32 matmul"
    if all(dtype in _tree.HALF for dtype in traced):
        if result == FLOAT32:
            return "a float32 result was asked of half operands"
        return "traced in half"
    precision = eqn.params.get("precision")
    for part in precision if isinstance(precision, tuple) else (precision,):
        if part is not None and part not in _LOWERABLE:
            return f"precision={part}"
    return SPECIAL_FUNCTION if is_in_special_function(eqn) else None


def is_outer_product(eqn: Eqn) -> bool:
    """A contraction of no axis: `einsum("i,j->ij")` of positions and frequencies.

    In a backward pass it is the gradient of a weight that met one vector.
    """
    if eqn.primitive.name != "dot_general":
        return False
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return not contracted


def selects(eqn: Eqn) -> bool:
    """Whether the entries of a result are entries of an operand, or numbers.

    Such as what `relu` and pooling by maximum return.
    """
    call = _registry.call_rule(eqn.primitive.name)
    if call is not None:
        eqns = [inner for body in call.bodies(eqn) for inner in body.eqns]
        eqns = [inner for inner in eqns if any(map(_is_array, inner.outvars))]
        return bool(eqns) and all(map(selects, eqns))
    is_selection = eqn.primitive.name in SELECTING
    return is_selection and sum(map(_is_array, eqn.invars)) == 1


def _can_be_float(atom: Atom) -> bool:
    return castable_dtype(atom) is not None or is_integer(atom)


def _is_array(atom: Atom) -> bool:
    """False for a number."""
    return getattr(atom.aval, "size", 0) != 1
