"""The name scopes by which jaxmp marks parts of a program, and how they are read.

A mark is set while a function is traced, and found again in its jaxpr. No mode is
entered: what is marked can be jitted, differentiated and batched as it was.
"""

from jaxmp._jaxpr.scopes import QUANTIZE_PREFIX, name_scopes, scope_names
from jaxmp._jaxpr.types import Eqn

AUTOCAST_SCOPE = "jaxmp.autocast"
"""An autocast inside has decided about it."""
FULL_PRECISION_SCOPE = "jaxmp.full_precision"
"""`full_precision` keeps autocast from it."""
LAYER_SCOPE = "jaxmp.layer"
"""`apply_policy` has decided about one of Flax's layers."""
BORDER_SCOPE = "jaxmp.border"
"""A cast that shows a half result to code that was written for float32. It does not ask
for float32: the value stays in half, and follows its readers."""
HALF_SCOPE = "jaxmp.half_operands"
"""A function that was traced on half operands, such as a fused kernel."""
WIDE_GRADIENTS_SCOPE = "jaxmp.gradients_in_float32"
"""A layer whose weights get their gradients in float32."""
HALF_GRADIENTS_SCOPE = "jaxmp.gradients_in_half"
"""A layer whose weights get theirs in half, among others that get them in float32."""

OWN_MATMUL_SCOPE = "jaxmp.own_matmul"
"""A layer whose author gave it a matmul of its own."""

MARKS = frozenset(
    (
        AUTOCAST_SCOPE,
        FULL_PRECISION_SCOPE,
        LAYER_SCOPE,
        BORDER_SCOPE,
        HALF_SCOPE,
        WIDE_GRADIENTS_SCOPE,
        HALF_GRADIENTS_SCOPE,
        OWN_MATMUL_SCOPE,
    )
)


def scopes(eqn: Eqn) -> tuple[str, ...]:
    """The user's name scopes around an equation, normalised, without jaxmp's own."""
    return name_scopes(eqn, without=MARKS)


def is_border(eqn: Eqn) -> bool:
    """True for a cast at the border of a layer, which is not meant as a cast."""
    return BORDER_SCOPE in scope_names(eqn)


def is_in_layer(eqn: Eqn) -> bool:
    """True inside one of Flax's layers under a policy, and of what is like one."""
    names = scope_names(eqn)
    return LAYER_SCOPE in names or HALF_SCOPE in names


def has_half_gradients(eqn: Eqn, around: bool) -> bool:
    """Whether weights get their gradients in half here, given how it is around."""
    for name in reversed(scope_names(eqn)):
        if name in (WIDE_GRADIENTS_SCOPE, HALF_GRADIENTS_SCOPE):
            return name == HALF_GRADIENTS_SCOPE
    return around


def quantize_scope(name: str) -> str:
    """The mark of a layer whose matmuls are multiplied as a recipe says.

    Args:
      name: as in `PolicyRule.quantize`.
    """
    return QUANTIZE_PREFIX + name


def quantize_mark(eqn: Eqn, around: str | None) -> str | None:
    """The recipe that is marked here, given which is around; None for none.

    Returns:
      A name, `"none"` to leave matmuls in half, or `OWN_MATMUL_SCOPE`.
    """
    for name in reversed(scope_names(eqn)):
        if name == OWN_MATMUL_SCOPE:
            return name
        if name.startswith(QUANTIZE_PREFIX):
            return name.removeprefix(QUANTIZE_PREFIX)
    return around


def is_marked_to_quantize(eqn: Eqn) -> bool:
    """Whether a layer around an equation asks for a recipe of its own."""
    return any(name.startswith(QUANTIZE_PREFIX) for name in scope_names(eqn))


def decided_elsewhere(eqn: Eqn) -> bool:
    """True for what an autocast inside decides, or a kernel got half operands for."""
    names = scope_names(eqn)
    return AUTOCAST_SCOPE in names or HALF_SCOPE in names


def is_on_half_operands(eqn: Eqn) -> bool:
    """True for what is computed inside a function that got half operands."""
    return HALF_SCOPE in scope_names(eqn)
