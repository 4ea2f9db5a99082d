"""`retry`: computes the gradients of one batch again at a lower scale."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp.errors import LossScaleOptionError, MissingLossScale
from jaxmp.loss_scale._access import get_loss_scale
from jaxmp.loss_scale.state import LossScaleState
from jaxmp.loss_scale.state_machines import check_count, check_power_of_two


def retry(
    value_and_grad_fn: Callable[..., Any],
    *,
    max_retries: int = 3,
    backoff_factor: float = 0.5,
    min_scale: float = 1.0,
) -> Callable[..., Any]:
    """Computes gradients again at a lower scale instead of losing the batch.

    A skipped step costs its batch. Where data is scarce, a retry costs time instead:
    while gradients are non-finite, the same arguments are evaluated again at a lower
    scale, in a compiled loop. A step that does not overflow is as fast as before.

    Args:
      value_and_grad_fn: result of `jaxmp.value_and_grad`, for a function whose `aux` is
        a pytree of arrays and which has no side effects (split an nnx model with state
        first).
      max_retries: how often to try again; at least 0.
      backoff_factor: factor of the scale on each try, a power of two below 1.
      min_scale: lowest scale to try, a power of two.

    Returns:
      A function `(*args, loss_scale=state, **kwargs)` that returns
      `((value, grads), state)`. Pass this `state`, which has the scale of the last try,
      to `update`; a lower scale starts counting good steps anew. `loss_scale` has to be
      the state of `loss_scaling` itself.

    Raises:
      LossScaleOptionError: for an option out of range.
      MissingLossScale: from the function, if `loss_scale` is anything else.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16")
      >>> w = jnp.float16(1)
      >>> loss_fn = lambda w: (w * 2).astype(jnp.float32)
      >>> step = jaxmp.retry(jaxmp.value_and_grad(loss_fn))
      >>> (loss, grads), state = step(w, loss_scale=tx.init(w.astype(jnp.float32)))
      >>> float(grads), float(state.loss_scale)
      (2.0, 16384.0)
    """
    check_count("max_retries", max_retries, at_least=0)
    check_power_of_two("backoff_factor", backoff_factor)
    check_power_of_two("min_scale", min_scale)
    if backoff_factor >= 1:
        raise LossScaleOptionError(
            f"backoff_factor={backoff_factor!r} would not lower the scale. Use a power "
            "of two below 1, such as 0.5."
        )

    @functools.wraps(value_and_grad_fn)
    def with_retries(*args: Any, loss_scale: Any = None, **kwargs: Any) -> Any:
        if not isinstance(loss_scale, LossScaleState):
            raise MissingLossScale(
                "retry() returns the state of loss_scaling with another scale in it, "
                f"and was given a {type(loss_scale).__name__}. Pass the state itself: "
                "step(params, batch, loss_scale=opt_state)"
            )
        get_loss_scale(loss_scale)  # raises if there is more than one

        def attempt(scale: jax.Array) -> Any:
            state = loss_scale._replace(loss_scale=scale)
            return value_and_grad_fn(*args, loss_scale=state, **kwargs)

        def overflowed(carry: Any) -> jax.Array:
            tries, scale, (_, grads) = carry
            lower = scale > min_scale
            return ~_tree.all_finite(grads) & (tries < max_retries) & lower

        def again(carry: Any) -> Any:
            tries, scale, _ = carry
            scale = jnp.maximum(scale * jnp.float32(backoff_factor), min_scale)
            return tries + 1, scale, attempt(scale)

        first = (jnp.int32(0), loss_scale.loss_scale, attempt(loss_scale.loss_scale))
        tries, scale, result = jax.lax.while_loop(overflowed, again, first)
        good_steps = jnp.where(tries == 0, loss_scale.good_steps, 0)
        return result, loss_scale._replace(loss_scale=scale, good_steps=good_steps)

    return with_retries
