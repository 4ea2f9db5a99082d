"""`ema`: an average of the weights, always in float32.

    tx = loss_scaling(master_weights(optax.chain(adamw, ema(0.9999))), policy)

It stands last, passes the update on unchanged, and averages what the parameters become.
Inside `master_weights` it averages the float32 masters. Skipped steps and the
micro-batches within a window of `accumulate` leave the average alone. (`optax.ema`
differs: it averages the updates.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import _tree
from jaxmp._transformations import composition
from jaxmp._transformations.wrapping import float32_view, pinned, require_params
from jaxmp._tree import PyTree
from jaxmp.errors import MissingState, OptimizerOptionError


class EmaState(NamedTuple):
    """State of `ema`."""

    shadow: PyTree
    """The averaged weights, float32 at least."""

    transformation = "ema"


def ema(decay: float) -> optax.GradientTransformationExtraArgs:
    """Averages the weights exponentially, starting from the first ones.

    Args:
      decay: share of the average that stays on every step, from 0 to below 1. The
        average covers about `1 / (1 - decay)` steps.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `EmaState`. It goes
      last in a chain, and `update` needs the parameters. `get_ema` reads the average.

    Raises:
      OptimizerOptionError: for a `decay` out of range.
      MissingParams: from `update` without parameters.

    References:
      Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992
      (https://doi.org/10.1137/0330046).

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.optimizers import ema, get_ema
      >>> tx = optax.chain(optax.sgd(1.0), ema(0.75))
      >>> w = jnp.bfloat16(2)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(jnp.float32(-4), state, w)
      >>> w = optax.apply_updates(w, updates)
      >>> print(w, get_ema(state, w))
      6 3
    """
    if not 0 <= decay < 1:
        raise OptimizerOptionError(
            f"decay={decay} is not the share of an average that stays. Use a number "
            "from 0 to below 1, such as 0.999."
        )

    def init_fn(params: optax.Params) -> EmaState:
        return EmaState(jax.tree.map(_own_copy, float32_view(params)))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EmaState]:
        del extra_args
        composition.require_state(state, EmaState, "ema")
        require_params(params, "ema")
        moved = optax.apply_updates(float32_view(params), updates)
        shadow = jax.tree.map(_average, state.shadow, moved)
        return updates, EmaState(pinned(shadow, state.shadow))

    def _average(old: Any, new: Any) -> Any:
        if not _tree.is_inexact(old):
            return new
        return old + (new - old) * np.asarray(1 - decay, old.dtype)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def get_ema(opt_state: optax.OptState, params: PyTree) -> PyTree:
    """Returns the averaged weights, to evaluate with.

    Args:
      opt_state: anything that contains the state of one `ema`.
      params: the parameters, for structure and dtypes. Pass
        `jax.eval_shape(get_master_weights, opt_state, params)` to get float32.

    Returns:
      The average, with the structure and dtypes of `params`.

    Raises:
      MissingState: if `opt_state` holds no average, or several.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxmp.optimizers import ema, get_ema
      >>> w = jnp.bfloat16(2)
      >>> get_ema(ema(0.999).init(w), w).dtype.name
      'bfloat16'
    """
    states = [x for x in composition.nodes(opt_state) if isinstance(x, EmaState)]
    if len(states) != 1:
        raise MissingState(
            f"There are {len(states)} averages in this {type(opt_state).__name__}, and "
            "one is needed. Make the optimizer with one ema(decay) at its end: "
            "optax.chain(optax.adamw(1e-3), ema(0.999))."
        )

    def average(p: Any, x: Any) -> Any:
        if isinstance(x, optax.MaskedNode):  # overwrite_with_gradient has no average
            return p
        return x.astype(p.dtype) if _tree.is_inexact(x) else x

    return jax.tree.map(average, params, states[0].shadow)


def _own_copy(x: Any) -> Any:
    """A buffer of its own, so that parameters and state can both be donated."""
    return jnp.copy(x) if _tree.is_array(x) else x
