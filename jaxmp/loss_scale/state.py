"""`LossScaleState`, and how it is found in whatever holds it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jmp
import optax

from jaxmp.errors import MissingLossScale, MultipleLossScales
from jaxmp.loss_scale.jmp_classes import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
    of_jmp,
)
from jaxmp.loss_scale.state_machines import Scale

LOSS_UNKNOWN, LOSS_NONFINITE, LOSS_FINITE = -1, 0, 1


class LossScaleState(NamedTuple):
    """State of `loss_scaling`: scalars beside the state of the inner optimizer.

    Every mode has the same type, so that a bfloat16 run can go on in float16.
    """

    inner_state: optax.OptState
    """State of the inner transformation, as of the last applied step."""
    loss_scale: jax.Array
    """float32, a power of two: the scale for the next step."""
    good_steps: jax.Array
    """int32: finite steps in a row since the scale last moved."""
    hysteresis_left: jax.Array
    """int32: non-finite steps left before the scale backs off."""
    grads_finite: jax.Array
    """bool: whether every gradient that the last step used was finite."""
    loss_finite: jax.Array
    """int32: 1 or 0 for the last step's loss, -1 if no `value=` was passed."""
    applied_steps: jax.Array
    """int32: steps that moved the parameters."""
    skipped_steps: jax.Array
    """int32: steps that changed nothing."""
    consecutive_skips: jax.Array
    """int32: skipped steps since the last applied one."""

    transformation = "loss_scaling"


def first_state(inner_state: optax.OptState, scale: Scale) -> LossScaleState:
    """Puts a first scale and counts of zero beside the state of an optimizer."""
    return LossScaleState(
        inner_state=inner_state,
        **scale._asdict(),
        grads_finite=jnp.ones((), jnp.bool_),
        loss_finite=jnp.full((), LOSS_UNKNOWN, jnp.int32),
        applied_steps=jnp.zeros((), jnp.int32),
        skipped_steps=jnp.zeros((), jnp.int32),
        consecutive_skips=jnp.zeros((), jnp.int32),
    )


_KINDS = (
    LossScaleState,
    NoOpLossScale,
    StaticLossScale,
    DynamicLossScale,
    jmp.NoOpLossScale,
    jmp.StaticLossScale,
    jmp.DynamicLossScale,
)


def find_all(tree: Any) -> list[LossScaleState | LossScale]:
    """Lists every loss scale in a tree, including those inside another one."""
    found = []
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, _KINDS)):
        if isinstance(node, _KINDS):
            found.append(of_jmp(node))
        if isinstance(node, LossScaleState):
            found += find_all(node.inner_state)
    return found


def find(tree: Any) -> LossScaleState | LossScale:
    """Returns the one loss scale in a tree.

    Raises:
      MissingLossScale: if there is none.
      MultipleLossScales: if there are several.
    """
    found = find_all(tree)
    if not found:
        raise MissingLossScale(
            f"There is no loss scale in this {type(tree).__name__}. Pass the state of "
            "an optimizer made by jaxmp.loss_scaling(optimizer, policy), or a "
            "jaxmp.LossScale."
        )
    if len(found) > 1:
        raise multiple_loss_scales(len(found))
    return _without_variables(found[0])


def find_state(tree: Any) -> LossScaleState:
    """Returns the one state of `loss_scaling` in a tree.

    Raises:
      MissingLossScale: if there is none, or only a loss scale of jmp's kind.
      MultipleLossScales: if there are several.
    """
    state = find(tree)
    if not isinstance(state, LossScaleState):
        raise MissingLossScale(
            f"A {type(state).__name__} counts no steps. Pass the state of an optimizer "
            "made by jaxmp.loss_scaling(optimizer, policy)."
        )
    return state


def multiple_loss_scales(count: int) -> MultipleLossScales:
    """The error for several scales in one state, which shows the right order."""
    return MultipleLossScales(
        f"There are {count} loss scales in one optimizer state, and every gradient "
        "can be unscaled by one only. Put one outermost, around everything else: "
        "loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), "
        "policy). For several losses, keep a state each."
    )


def _without_variables(scale: LossScaleState | LossScale) -> LossScaleState | LossScale:
    """Takes the scalars out of the Variables in which nnx.Optimizer keeps them."""
    if not isinstance(scale, LossScaleState):
        return scale
    scalars = {
        name: jax.tree.leaves(value)[0]
        for name, value in scale._asdict().items()
        if name != "inner_state"
    }
    return scale._replace(**scalars)
