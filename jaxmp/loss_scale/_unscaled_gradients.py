"""Warns of gradients that were computed without the optimizer's loss scale.

A `jax.grad` left beside a float16 optimizer scales nothing: small gradients become zero
while every metric looks right. Inside one compiled function JAX's record shows it: the
gradients were made by a transposition, and do not depend on the loss scale.

No warning is given where the record does not reach: outside `jit`, where gradients are
arguments of the function that applies them, and where they were computed in a nested
function that gets the whole state. Nor is there one for gradients made by hand.
"""

from typing import Any

import jax

from jaxmp import _warnings
from jaxmp._jaxpr.tracers import is_input, is_transposed, same_value, sources
from jaxmp.errors import UnscaledGradientsWarning


def warn_if_unscaled(grads: Any, loss_scale: Any, *, by_hand: bool) -> None:
    """Warns if gradients were differentiated in this trace, but not under the scale.

    Args:
      grads: pytree of arrays.
      loss_scale: loss scale of the state that `update` got.
      by_hand: whether the loss is scaled by `scale_loss`.
    """
    if not is_input(loss_scale) or not _differentiated_without(grads, loss_scale):
        return
    repair = (
        "Differentiate jaxmp.scale_loss(loss, opt_state)"
        if by_hand
        else "Replace jax.grad by jaxmp.grad(loss_fn)(..., loss_scale=opt_state), and "
        "jax.value_and_grad by jaxmp.value_and_grad (of a TrainState: "
        "state.value_and_grad(loss_fn)(...))"
    )
    _warnings.warn(
        "These gradients were computed without the loss scale of the optimizer that "
        "they are given to, so small ones have become zero in float16. "
        f"{repair}. If they need no scale, say so: "
        "loss_scaling(optimizer, jaxmp.NoOpLossScale()).",
        UnscaledGradientsWarning,
    )


def _differentiated_without(grads: Any, loss_scale: Any) -> bool:
    waiting = jax.tree.leaves(grads)
    seen, equations = set(), {}
    while waiting:
        value = waiting.pop()
        if same_value(value, loss_scale):
            return False
        found = sources(value)
        if found is None or id(value) in seen:
            continue
        seen.add(id(value))
        equation, inputs = found
        if id(equation) not in equations:
            equations[id(equation)] = equation
            waiting += inputs
    return any(map(is_transposed, equations.values()))
