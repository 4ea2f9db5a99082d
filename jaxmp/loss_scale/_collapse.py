"""`raise_if_collapsed`: stops a run whose steps are all skipped, and says why."""

from typing import Any

import jax
import numpy as np

from jaxmp._transformations import composition
from jaxmp.errors import LossScaleCollapsed, NotOnHost
from jaxmp.loss_scale.state import (
    LOSS_FINITE,
    LOSS_NONFINITE,
    LOSS_UNKNOWN,
    find_state,
)
from jaxmp.loss_scale.state_machines import check_count


def raise_if_collapsed(opt_state: Any, *, max_consecutive_skips: int) -> None:
    """Raises on the host if too many steps in a row were skipped.

    It waits for the step that made the state, so call it only now and then.

    Args:
      opt_state: anything that contains one state of `loss_scaling`. For an ensemble
        under `vmap`, the worst member counts.
      max_consecutive_skips: how many skips in a row are too many. A dynamic scale that
        starts at 2^16 finds its place within 17.

    Raises:
      LossScaleOptionError: if `max_consecutive_skips` is below 1.
      LossScaleCollapsed: with the cause, as far as the state knows it. Pass
        `value=loss` to `update` to tell a bad loss from bad gradients, and put a
        `jaxmp.numerics.monitor` around the optimizer to name those gradients.
      NotOnHost: if called in a compiled function.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> state = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16").init(jnp.ones(2))
      >>> jaxmp.raise_if_collapsed(state, max_consecutive_skips=50)
    """
    check_count("max_consecutive_skips", max_consecutive_skips)
    state = find_state(opt_state)
    try:
        skips = np.ravel(np.asarray(state.consecutive_skips))
    except jax.errors.TracerArrayConversionError:
        raise NotOnHost(
            "raise_if_collapsed() reads values and was called in a compiled function. "
            "Call it outside jit, on the state that the step returned."
        ) from None
    worst = int(skips.argmax())
    if skips[worst] < max_consecutive_skips:
        return
    scale = np.ravel(np.asarray(state.loss_scale))[worst]
    loss_finite = np.ravel(np.asarray(state.loss_finite))[worst]
    member = f" (ensemble member {worst})" if skips.size > 1 else ""
    raise LossScaleCollapsed(
        f"The last {skips[worst]} steps were all skipped{member}; the loss scale is "
        f"now {scale:g}. {_CAUSES[int(loss_finite)]}{_culprits(opt_state, worst)}"
    )


def _culprits(opt_state: Any, member: int) -> str:
    """Names the non-finite gradients, if a monitor has recorded them."""
    leaves = composition.nonfinite_leaves(opt_state, member)
    if not leaves:
        return ""
    worst_first = sorted(leaves.items(), key=lambda item: -item[1])
    shown = [f"{path} ({count})" for path, count in worst_first[:_MOST_SHOWN]]
    if len(leaves) > _MOST_SHOWN:
        shown.append(f"and {len(leaves) - _MOST_SHOWN} more leaves")
    return f" Non-finite gradients in the last skipped step: {', '.join(shown)}."


_MOST_SHOWN = 10
_CAUSES = {
    LOSS_NONFINITE: (
        "The loss itself was non-finite: the forward pass already overflowed or "
        "divided by zero, and no loss scale can help. Look at the learning rate, the "
        "batch and the parameters, or compute in bfloat16, which has float32's range."
    ),
    LOSS_FINITE: (
        "The loss was finite and only gradients overflowed. If the scale still falls, "
        "let it, or start lower with init_scale=; if it stands at min_scale, lower "
        "min_scale (it may be below 1) or compute in bfloat16, which has float32's "
        "range."
    ),
    LOSS_UNKNOWN: (
        "Whether the loss itself was non-finite is not known: pass it, as "
        "update(grads, state, params, value=loss). A non-finite loss means that the "
        "forward pass overflowed, which no loss scale can help. A finite one means "
        "that only gradients did, which a lower min_scale= or bfloat16 can help."
    ),
}
