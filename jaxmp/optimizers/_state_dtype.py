"""`cast_state`: stores the moments of any optimizer in half the bytes.

    moments = cast_state(optax.adamw(1e-3), "bfloat16", rounding="stochastic")
    tx = loss_scaling(master_weights(moments), policy)

The state is widened to float32 before every update and rounded after it, so the inner
optimizer always computes in float32.

To find the moments without guessing from names, `init` is traced twice: for the
parameters, and for parameters with every axis one longer. An array that grows is a
moment, as are the factors of Adafactor and the history of L-BFGS. An array that does
not grow is a count, a hyperparameter or a scalar of the algorithm, and keeps its dtype.

Sharp edges
- Rounded to nearest, an average that moves by less than 1/512 of itself stands still,
  as Adam's second moment does with b2 = 0.999. Stochastic rounding avoids this.
- float16 has no room for squares of small gradients: below 2e-4 they become zero.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import _tree
from jaxmp._transformations import composition
from jaxmp._transformations.rounding import round_to_nearest
from jaxmp._transformations.wrapping import (
    LOSS_SCALING_OUTERMOST,
    float32_view,
    pinned,
    strong_state,
    with_extra_args,
)
from jaxmp.errors import OptimizerOptionError
from jaxmp.optimizers._stochastic_rounding import (
    half_or_float32,
    keys_like,
    stochastic_round,
)

ROUNDINGS = ("nearest", "stochastic")

_REPAIRS = {
    "loss_scaling": LOSS_SCALING_OUTERMOST,
    "master_weights": (
        "It would round the float32 master weights, whose point is not to be rounded. "
        "Swap them: master_weights(cast_state(optax.adamw(1e-3), 'bfloat16'))."
    ),
    "stochastic_rounding": (
        "It would see float32 parameters there, and round nothing. Swap them: "
        "stochastic_rounding(cast_state(optax.adamw(1e-3), 'bfloat16'), seed=0)."
    ),
    "accumulate": (
        "It would round the sums of gradients, which are float32 for a reason. Swap "
        "them: accumulate(cast_state(optax.adamw(1e-3), 'bfloat16'), 4)."
    ),
    "ema": (
        "It would round the averaged weights, which are float32 for a reason. Use both "
        "in a chain: "
        "optax.chain(cast_state(optax.adamw(1e-3), 'bfloat16'), ema(0.999))."
    ),
    "cast_state": "One dtype is enough: cast_state(optax.adamw(1e-3), 'bfloat16').",
}


class CastStateState(NamedTuple):
    """State of `cast_state`."""

    inner_state: optax.OptState
    """State of the inner optimizer, with its moments in the chosen dtype."""
    draws: Any
    """int32: how often it was rounded at random; None for rounding to nearest."""

    transformation = "cast_state"


def cast_state(
    inner: optax.GradientTransformation,
    dtype: Any,
    *,
    rounding: str = "nearest",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Stores the moments of an optimizer in another dtype, and computes in float32.

    Args:
      inner: any Optax transformation. It sees float32 parameters, gradients and
        moments.
      dtype: storage dtype of the moments: bfloat16, float16 or float32. Counts, scalars
        and hyperparameters keep theirs.
      rounding: `"nearest"` or `"stochastic"`.
      seed: seed of stochastic rounding.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `CastStateState`.

    Raises:
      OptimizerOptionError: for another dtype or rounding.
      TransformationOrder: from `init`, if `inner` contains something that goes around
        it: a loss scale, master weights, stochastic rounding, accumulators or averaged
        weights.

    References:
      Zamirai et al., "Revisiting BFloat16 Training", 2020
      (https://arxiv.org/abs/2010.06192).

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> tx = jaxmp.cast_state(optax.adam(1e-3), "bfloat16", rounding="stochastic")
      >>> state = tx.init(jnp.ones(4))
      >>> adam = state.inner_state[0]
      >>> adam.mu.dtype.name, adam.nu.dtype.name, adam.count.dtype.name
      ('bfloat16', 'bfloat16', 'int32')
    """
    inner = with_extra_args(inner)
    dtype = half_or_float32(dtype)
    if rounding not in ROUNDINGS:
        raise OptimizerOptionError(
            f"rounding={rounding!r} is unknown. Use one of: "
            f"{', '.join(map(repr, ROUNDINGS))}."
        )
    stochastic = rounding == "stochastic"

    def init_fn(params: optax.Params) -> CastStateState:
        weights = float32_view(params)
        inner_state = strong_state(inner.init(weights))
        composition.refuse_inside("cast_state", inner_state, _REPAIRS)
        moments = _grows_with_params(inner, weights)
        inner_state = jax.tree.map(
            lambda x, grows: x.astype(dtype) if grows and _is_castable(x) else x,
            inner_state,
            moments,
        )
        return CastStateState(inner_state, jnp.int32(0) if stochastic else None)

    def store(moments: optax.OptState, state: CastStateState) -> CastStateState:
        stored = functools.partial(_stored, dtype)
        if not stochastic:
            inner_state = jax.tree.map(stored, moments, state.inner_state)
            return CastStateState(inner_state, None)
        keys = keys_like(moments, seed, state.draws)
        inner_state = jax.tree.map(stored, moments, state.inner_state, keys)
        return CastStateState(inner_state, state.draws + 1)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CastStateState]:
        composition.require_state(state, CastStateState, "cast_state")
        moments = jax.tree.map(
            lambda x: _tree.at_least_float32(x) if _has_dtype(x, dtype) else x,
            state.inner_state,
        )
        updates, moments = inner.update(
            float32_view(updates), moments, float32_view(params), **extra_args
        )
        return updates, store(moments, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stored(dtype: np.dtype, x: Any, old: Any, key: jax.Array | None = None) -> Any:
    """Rounds a leaf of the state for storage: to nearest, or at random with a key."""
    if _has_dtype(old, dtype) and dtype in _tree.HALF:
        if key is None:
            x = round_to_nearest(_tree.at_least_float32(x), dtype)
        else:
            x = stochastic_round(x, dtype, key)
    return pinned(x, old)


def _has_dtype(x: Any, dtype: np.dtype) -> bool:
    return _tree.is_array(x) and x.dtype == dtype


def _is_castable(x: Any) -> bool:
    return _tree.is_array(x) and x.dtype in _tree.CASTABLE


def _grows_with_params(inner: Any, params: Any) -> Any:
    """Returns for each leaf of the state whether its shape follows the parameters'."""

    def lengthen(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct([n + 1 for n in x.shape], x.dtype)

    shapes = jax.eval_shape(inner.init, params)
    longer = jax.eval_shape(inner.init, jax.tree.map(lengthen, params))
    return jax.tree.map(lambda x, y: x.shape != y.shape, shapes, longer)
