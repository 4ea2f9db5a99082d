"""What kind of arithmetic an operation is, which decides what its gradient keeps.

A jitted function, such as `jax.nn.relu`, is what all of its operations are.
"""

from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.primitives import LAYOUT, LINEAR
from jaxmp._jaxpr.types import Eqn
from jaxmp._jaxpr.walk import unwrapped
from jaxmp.casting.ops import _registry
from jaxmp.casting.ops._op_lists import OpClass


def is_nonlinear(eqn: Eqn) -> bool:
    """Whether the gradient of an equation needs a floating operand of it."""
    return any(map(_is_nonlinear, unwrapped(eqn)))


def _is_nonlinear(eqn: Eqn) -> bool:
    name = eqn.primitive.name
    if name in LINEAR or not any(map(castable_dtype, eqn.outvars)):
        return False
    if name in ("mul", "div"):
        # A factor of one number leaves no residual but, if it is learnt, its own.
        factors = eqn.invars if name == "mul" else eqn.invars[1:]
        return not any(is_literal(v) or v.aval.size == 1 for v in factors)
    return True


def follows(eqn: Eqn) -> bool:
    """Whether an equation would be in half if it were not for its readers."""
    return all(map(_follows, unwrapped(eqn)))


def _follows(eqn: Eqn) -> bool:
    is_follow = _registry.entry(eqn.primitive.name).op_class is OpClass.FOLLOW
    return is_follow or not any(map(castable_dtype, eqn.outvars))


def is_elementwise(eqn: Eqn) -> bool:
    """Whether compilers can compute an equation while they read its operands."""
    return all(map(_is_elementwise, unwrapped(eqn)))


def _is_elementwise(eqn: Eqn) -> bool:
    if eqn.primitive.name in ("broadcast_in_dim", "copy", "copy_p", "stop_gradient"):
        return True
    shapes = {v.aval.shape for v in (*eqn.invars, *eqn.outvars)}
    return len(shapes - {()}) <= 1 and eqn.primitive.name not in LAYOUT


def stops_gradient(eqn: Eqn) -> bool:
    """Whether a gradient ends in an equation."""
    return any(e.primitive.name == "stop_gradient" for e in unwrapped(eqn))


def amplifies(eqn: Eqn) -> bool:
    """Whether an equation multiplies with a number above 1."""
    if eqn.primitive.name not in ("mul", "div"):
        return False
    numbers = [abs(v.val) for v in eqn.invars if is_literal(v)]
    return any(x > 1 if eqn.primitive.name == "mul" else x < 1 for x in numbers)
