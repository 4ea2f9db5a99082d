"""Finds variances taken as mean(x²) - mean(x)².

Where the mean is much larger than the deviation, the two nearly cancel, in float32 too:
a LayerNorm of 1000 +- 0.5 is wrong by factors. Half precision is not to blame, and no
cast mends it.
"""

from typing import Any

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.types import Atom, Eqn, Jaxpr, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp._jaxpr.walk import makers

NOTE = (
    "mean(x^2) - mean(x)^2 cancels where the mean is large, in float32 too: "
    "take the mean of (x - mean)^2 (use_fast_variance=False)"
)

_PASSES_ON = frozenset(
    ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy")
)


def cancelling(jaxpr: Jaxpr) -> set[int]:
    """Returns the ids of the subtractions in a jaxpr that are such a variance."""
    made_by = makers(jaxpr)

    def made(atom: Atom) -> Eqn | None:
        """The equation that computes a value, behind changes of shape and scale."""
        while not is_literal(atom) and atom in made_by:
            eqn = made_by[atom]
            is_scaled = eqn.primitive.name in ("mul", "div") and _is_number(eqn, 1)
            if eqn.primitive.name not in _PASSES_ON and not is_scaled:
                return eqn
            atom = eqn.invars[0]
        return None

    def summed(eqn: Eqn | None) -> Var | None:
        """What a sum is over, or None."""
        if eqn is None or eqn.primitive.name not in ("reduce_sum", "psum"):
            return None
        return eqn.invars[0]

    def is_mean_of_square(eqn: Eqn | None) -> bool:
        inside = summed(eqn)
        return inside is not None and _square_of(made(inside)) is not None

    def is_square_of_mean(eqn: Eqn | None) -> bool:
        base = _square_of(eqn)
        return base is not None and summed(made(base)) is not None

    return {
        id(eqn)
        for eqn in open_jaxpr(jaxpr).eqns
        if eqn.primitive.name == "sub"
        and is_mean_of_square(made(eqn.invars[0]))
        and is_square_of_mean(made(eqn.invars[1]))
    }


def _square_of(eqn: Eqn) -> Any:
    """What an equation squares, or None."""
    if eqn is None:
        return None
    name, operands = eqn.primitive.name, eqn.invars
    is_power = name == "integer_pow" and eqn.params["y"] == 2
    is_product = name == "mul" and operands[0] is operands[-1]
    return operands[0] if name == "square" or is_power or is_product else None


def _is_number(eqn: Eqn, index: int) -> bool:
    operand = eqn.invars[index]
    return is_literal(operand) or operand.aval.size == 1
