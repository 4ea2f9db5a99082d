"""Moments of any optimizer in half of the bytes, computed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.errors import OptimizerOptionError
from jaxmp.optimizers import cast_state

PARAMS = {"w": jnp.ones((8, 16)), "b": jnp.ones((16,))}


def dtypes(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(p, simple=True): x.dtype.name for p, x in leaves}


@pytest.mark.parametrize(
    ("tx", "moments"),
    [
        (optax.sgd(0.1, momentum=0.9), 2),
        (optax.adamw(optax.linear_schedule(0.1, 0.0, 10)), 4),
        (optax.adafactor(1e-2, min_dim_size_to_factor=4), None),
        (optax.lbfgs(), None),
        (optax.contrib.prodigy(), None),
        (optax.contrib.mechanize(optax.adam(0.1)), None),
        (optax.inject_hyperparams(optax.adamw)(1e-3), 4),
    ],
    ids=["sgd", "adamw", "adafactor", "lbfgs", "prodigy", "mechanize", "injected"],
)
def test_moments_are_cast_and_nothing_else_is(tx, moments):
    before = dtypes(tx.init(PARAMS))
    after = dtypes(cast_state(tx, "bfloat16").init(PARAMS).inner_state)
    changed = {path for path in before if before[path] != after[path]}
    assert all(before[p] == "float32" and after[p] == "bfloat16" for p in changed)
    assert moments is None or len(changed) == moments
    sizes = [x.size for x in jax.tree.leaves(tx.init(PARAMS)) if x.dtype == jnp.float32]
    halved = [
        x.size
        for x in jax.tree.leaves(cast_state(tx, "bfloat16").init(PARAMS))
        if x.dtype == jnp.bfloat16
    ]
    assert sum(halved) >= 0.9 * sum(sizes)


def test_hyperparameters_and_learned_scales_keep_their_precision():
    tx = optax.inject_hyperparams(optax.adamw)(1e-3, b2=0.999)
    state = cast_state(tx, "bfloat16").init(PARAMS)
    assert float(state.inner_state.hyperparams["b2"]) == np.float32(0.999)
    mechanic = cast_state(optax.contrib.mechanize(optax.adam(0.1)), "bfloat16")
    state = mechanic.init(PARAMS).inner_state
    assert {state.r.dtype.name, state.s.dtype.name, state.v.dtype.name} == {"float32"}


def run(tx, steps, grad, params=PARAMS):
    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda p: jnp.full(p.shape, grad, jnp.float32), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(
        lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=steps)[0]
    )(params)


def test_nearest_rounding_stalls_where_stochastic_rounding_does_not():
    exact = 1 - 0.999**1000
    nu = {}
    for rounding in "nearest", "stochastic":
        tx = cast_state(optax.scale_by_adam(), "bfloat16", rounding=rounding)
        _, state = run(tx, 1000, 1.0)
        nu[rounding] = float(state.inner_state.nu["w"].astype(jnp.float32).mean())
    assert nu["nearest"] < 0.5 * exact
    assert nu["stochastic"] == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_trains_as_float32_does(dtype, rounding):
    plain, _ = run(optax.adam(1e-2), 50, 0.3)
    cast, state = run(cast_state(optax.adam(1e-2), dtype, rounding=rounding), 50, 0.3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-2), cast, plain)
    assert state.inner_state[0].mu["w"].dtype == dtype


def test_float32_moments_of_half_parameters():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = cast_state(optax.adam(1e-2), "float32").init(params)
    assert state.inner_state[0].nu["w"].dtype == jnp.float32
    _, state = run(cast_state(optax.adam(1e-2), "float32"), 3, 1e-3, params)
    assert state.inner_state[0].nu["w"].dtype == jnp.float32


def test_same_seed_same_bits_other_seed_other_bits():
    def nu(seed):
        tx = cast_state(
            optax.scale_by_adam(), "bfloat16", rounding="stochastic", seed=seed
        )
        return np.asarray(run(tx, 5, 0.3)[1].inner_state.nu["w"]).view(np.uint16)

    np.testing.assert_array_equal(nu(0), nu(0))
    assert (nu(0) != nu(1)).any()


def test_adamw_with_split_master_and_bfloat16_moments_takes_eight_bytes():
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    moments = cast_state(optax.adamw(1e-3), "bfloat16", rounding="stochastic")
    tx = jaxmp.loss_scaling(jaxmp.master_weights(moments, split=True), "mixed_bfloat16")

    def size(*trees):
        return sum(x.nbytes for x in jax.tree.leaves(trees) if x.ndim) / 64**2

    assert size(params, tx.init(params)) == 8
    full = {"w": jnp.ones((64, 64))}
    assert size(full, optax.adamw(1e-3).init(full)) == 12


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e5m2"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(OptimizerOptionError, match=f"no rounding to {dtype}"):
        cast_state(optax.adam(1e-3), dtype)


def test_other_roundings_are_refused():
    with pytest.raises(OptimizerOptionError, match=r"'up'.*'nearest', 'stochastic'"):
        cast_state(optax.adam(1e-3), "bfloat16", rounding="up")
