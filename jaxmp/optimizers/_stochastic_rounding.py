"""Stochastic rounding, and an optimizer wrapper that lets half weights train alone.

    tx = loss_scaling(stochastic_rounding(optax.adamw(1e-3), seed=0), policy)

Rounding to nearest always loses a step that is too small for a bfloat16 weight.
Rounding up or down at random, in proportion to the distance, keeps it on average: the
weight moves once in a hundred steps, a hundred times as far. No float32 copy is stored.

The random bits come from Threefry and a counter in the state: the same seed and step
give the same bits on every backend, and a restored run goes on as if never stopped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxmp import _tree
from jaxmp._transformations import composition
from jaxmp._transformations.rounding import (
    FLOAT16_SUBNORMALS_PER_UNIT,
    SMALLEST_NORMAL_FLOAT16,
    landing_update,
)
from jaxmp._transformations.wrapping import (
    COPY_OR_RANDOM,
    LOSS_SCALING_OUTERMOST,
    float32_view,
    pinned,
    require_params,
    strong_state,
    with_extra_args,
)
from jaxmp.errors import OptimizerOptionError

_REPAIRS = {
    "loss_scaling": LOSS_SCALING_OUTERMOST,
    "master_weights": COPY_OR_RANDOM,
    "stochastic_rounding": (
        "Once is enough: stochastic_rounding(optax.adamw(1e-3), seed=0)."
    ),
}


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`."""

    inner_state: optax.OptState
    """State of the inner optimizer, as it is for float32 parameters."""
    draws: jax.Array
    """int32: how often the parameters were rounded; with the seed, the random key."""

    transformation = "stochastic_rounding"
    forwards_decision = True
    lands_on_half = True


def stochastic_rounding(
    inner: optax.GradientTransformation, *, seed: int
) -> optax.GradientTransformationExtraArgs:
    """Rounds updated half-precision weights at random, without a float32 copy.

    Args:
      inner: any Optax transformation. It sees float32 parameters and gradients.
      seed: seed of the random bits.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a
      `StochasticRoundingState`. Its updates are float32 and land on the rounded value,
      so `optax.apply_updates` has nothing left to round. An update of zero moves
      nothing. Parameters of other dtypes get the update of `inner`.

    Raises:
      TransformationOrder: from `init`, if `inner` contains a loss scale, master weights
        or stochastic rounding.
      MissingParams: from `update` without parameters.

    References:
      Gupta et al., "Deep Learning with Limited Numerical Precision", 2015
      (https://arxiv.org/abs/1502.02551); Zamirai et al., "Revisiting BFloat16
      Training", 2020 (https://arxiv.org/abs/2010.06192).

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> tx = jaxmp.stochastic_rounding(optax.sgd(1e-3), seed=0)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.ones(10_000), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(f"{params.astype(jnp.float32).mean():.4f}")
      0.9990
    """
    inner = with_extra_args(inner)

    def init_fn(params: optax.Params) -> StochasticRoundingState:
        inner_state = strong_state(inner.init(float32_view(params)))
        composition.refuse_inside("stochastic_rounding", inner_state, _REPAIRS)
        return StochasticRoundingState(inner_state, jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StochasticRoundingState]:
        composition.require_state(state, StochasticRoundingState, "stochastic_rounding")
        require_params(params, "stochastic_rounding")
        weights = float32_view(params)
        updates, inner_state = inner.update(
            float32_view(updates), state.inner_state, weights, **extra_args
        )
        keys = keys_like(params, seed, state.draws)
        updates = jax.tree.map(_land, params, updates, keys)
        inner_state = pinned(inner_state, state.inner_state)
        return updates, StochasticRoundingState(inner_state, state.draws + 1)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def stochastic_round(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """Rounds up or down at random, so that the expectation is `x`.

    Values that `dtype` can represent are kept bit for bit, and so are NaN, infinities
    and the sign of zero. A finite number never becomes infinite: beyond the largest
    finite value of `dtype` it becomes that value. Subnormal results are rounded like
    all others.

    Args:
      x: real floating array; computed in float32.
      dtype: float16 or bfloat16; float32 only casts `x`.
      key: a key of `jax.random`. Threefry keys give the same bits on every backend.

    Returns:
      An array of `dtype`. The mean over keys is `x`, to 2^-24 of a float16 subnormal.

    Raises:
      OptimizerOptionError: for another dtype.

    References:
      Gupta et al., "Deep Learning with Limited Numerical Precision", 2015
      (https://arxiv.org/abs/1502.02551), section 3.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmp
      >>> x = jnp.full(100_000, 1 + 1e-4)
      >>> y = jaxmp.stochastic_round(x, jnp.bfloat16, jax.random.key(0))
      >>> print(jnp.unique(y).tolist(), f"{y.astype(jnp.float32).mean():.4f}")
      [1.0, 1.0078125] 1.0001
    """
    dtype = half_or_float32(dtype)
    if dtype in (jnp.float32, jnp.result_type(x)):
        return jnp.asarray(x, dtype)
    x = jnp.asarray(x, jnp.float32)
    random = jax.random.bits(key, x.shape, jnp.uint32)
    rounded = _round_bits(x, random, dtype)
    if dtype == jnp.float16:
        is_subnormal = jnp.abs(x) < SMALLEST_NORMAL_FLOAT16
        rounded = jnp.where(is_subnormal, _round_fixed_point(x, random), rounded)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def keys_like(tree: Any, seed: int, draws: jax.Array) -> Any:
    """Returns one random key for each leaf of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), draws)
    keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    return jax.tree.unflatten(structure, keys)


def half_or_float32(dtype: Any) -> np.dtype:
    """Reads a dtype, and refuses all but float16, bfloat16 and float32."""
    dtype = jnp.dtype(dtype)
    if dtype not in _tree.CASTABLE:
        raise OptimizerOptionError(
            f"There is no rounding to {dtype.name}. Use bfloat16, float16 or float32."
        )
    return dtype


def _round_bits(x: jax.Array, random: jax.Array, dtype: Any) -> jax.Array:
    """Adds random bits below the last place of `dtype`, and cuts them off.

    A carry moves the magnitude up to the next value, across powers of two as well.
    Integers are used because float32 arithmetic would flush bfloat16's subnormals.
    """
    info = jnp.finfo(dtype)
    lacking = np.uint32(2 ** (jnp.finfo(jnp.float32).nmant - info.nmant) - 1)
    largest = np.float32(info.max).view(np.uint32)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = bits & np.uint32(0x80000000)
    magnitude = bits ^ sign
    rounded = jnp.minimum(magnitude + (random & lacking), largest | lacking)
    return lax.bitcast_convert_type(sign | (rounded & ~lacking), jnp.float32)


def _round_fixed_point(x: jax.Array, random: jax.Array) -> jax.Array:
    steps = jnp.abs(x) * FLOAT16_SUBNORMALS_PER_UNIT
    whole = jnp.floor(steps)
    threshold = (random >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)
    steps = whole + (steps - whole > threshold).astype(jnp.float32)
    return jnp.copysign(steps / FLOAT16_SUBNORMALS_PER_UNIT, x)


def _land(p: Any, update: Any, key: jax.Array) -> Any:
    if not (_tree.is_array(p) and p.dtype in _tree.HALF):
        return update
    target = stochastic_round(p.astype(jnp.float32) + update, p.dtype, key)
    return landing_update(target.astype(jnp.float32), p)
