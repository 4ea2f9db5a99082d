"""`retry`: the same batch at a lower scale, in a compiled and bounded loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.errors import LossScaleOptionError, MissingLossScale, MultipleLossScales

TX = jaxmp.loss_scaling(
    optax.sgd(0.1), "mixed_float16", growth_interval=2, init_scale=2.0**15
)


def loss_fn(w, x):
    """Its float16 cotangent overflows above a scale of 2^13 for x = 4."""
    return (w.astype(jnp.float16) * x.astype(jnp.float16)).astype(jnp.float32)


W, X = jnp.float32(1), jnp.float32(4)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_overflow_is_tried_again_at_a_lower_scale(compiled):
    step = jaxmp.retry(jaxmp.value_and_grad(loss_fn))
    step = jax.jit(step) if compiled else step
    (loss, grads), state = step(W, X, loss_scale=TX.init(W))
    assert (float(loss), float(grads)) == (4.0, 4.0)
    assert float(state.loss_scale) == 2.0**13
    updates, state = TX.update(grads, state, W, value=loss)
    assert (int(state.applied_steps), int(state.skipped_steps)) == (1, 0)
    assert float(updates) == pytest.approx(-0.4)


def test_without_an_overflow_nothing_is_tried_again():
    calls = []

    def counted(w, x):
        jax.debug.callback(lambda: calls.append(1))
        return loss_fn(w, x)

    step = jax.jit(jaxmp.retry(jaxmp.value_and_grad(counted)))
    _, state = step(W, jnp.float32(1e-3), loss_scale=TX.init(W))
    jax.effects_barrier()
    assert len(calls) == 1
    assert float(state.loss_scale) == 2.0**15
    step(W, X, loss_scale=TX.init(W))
    jax.effects_barrier()
    assert len(calls) == 1 + 3


@pytest.mark.parametrize(("max_retries", "scale"), [(0, 2.0**15), (1, 2.0**14)])
def test_tries_are_bounded(max_retries, scale):
    step = jaxmp.retry(jaxmp.value_and_grad(loss_fn), max_retries=max_retries)
    (_, grads), state = step(W, X, loss_scale=TX.init(W))
    assert float(state.loss_scale) == scale
    assert not np.isfinite(grads)
    _, state = TX.update(grads, state, W)
    assert (int(state.skipped_steps), float(state.loss_scale)) == (1, scale / 2)


def test_no_try_goes_below_min_scale():
    step = jaxmp.retry(jaxmp.value_and_grad(loss_fn), max_retries=50, min_scale=2.0**10)
    (loss, grads), state = step(W, jnp.float32(jnp.nan), loss_scale=TX.init(W))
    assert float(state.loss_scale) == 2.0**10
    assert np.isnan(loss)
    assert np.isnan(grads)


def test_a_bigger_backoff_needs_fewer_tries():
    step = jaxmp.retry(
        jaxmp.value_and_grad(loss_fn), max_retries=1, backoff_factor=0.25
    )
    (_, grads), state = step(W, X, loss_scale=TX.init(W))
    assert float(state.loss_scale) == 2.0**13
    assert float(grads) == 4.0


def test_a_lower_scale_counts_good_steps_anew():
    """Else the scale would grow on this very step, into the overflow it came from."""
    _, state = TX.update(W, TX.init(W), W)
    assert int(state.good_steps) == 1
    step = jaxmp.retry(jaxmp.value_and_grad(loss_fn))
    (_, grads), state = step(W, X, loss_scale=state)
    _, state = TX.update(grads, state, W)
    assert float(state.loss_scale) == 2.0**13
    assert int(state.good_steps) == 1


def test_aux_argnums_kwargs_integer_leaves_and_grad():
    def with_aux(w, n, *, x):
        return loss_fn(w["w"], x), {"n": n, "w": w["w"]}

    w = {"w": W, "ids": jnp.int32(3), "none": None}
    step = jaxmp.retry(
        jaxmp.value_and_grad(with_aux, has_aux=True, argnums=(0,), allow_int=True)
    )
    ((loss, aux), (grads,)), state = step(w, 4, x=X, loss_scale=TX.init(W))
    assert (float(loss), float(grads["w"]), int(aux["n"])) == (4.0, 4.0, 4)
    assert grads["ids"].dtype == jax.dtypes.float0
    assert float(state.loss_scale) == 2.0**13


def test_vmap_over_an_ensemble_lowers_each_scale_by_itself():
    step = jaxmp.retry(jaxmp.value_and_grad(loss_fn))
    states = jax.vmap(TX.init)(jnp.ones(3))
    xs = jnp.array([1e-3, 4.0, 2.0])
    (_, grads), states = jax.vmap(lambda w, x, s: step(w, x, loss_scale=s))(
        jnp.ones(3), xs, states
    )
    np.testing.assert_array_equal(grads, np.float32(np.float16(xs)))
    assert states.loss_scale.tolist() == [2.0**15, 2.0**13, 2.0**14]


def test_the_state_keeps_its_types_and_compiles_once():
    step = jax.jit(jaxmp.retry(jaxmp.value_and_grad(loss_fn)))
    state = TX.init(W)
    types = jax.tree.map(jax.typeof, state)
    for x in (1e-3, 2.0, jnp.inf, 1.0):
        (loss, grads), state = step(W, jnp.float32(x), loss_scale=state)
        _, state = TX.update(grads, state, W, value=loss)
        assert jax.tree.map(jax.typeof, state) == types
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_retries": -1}, "max_retries=-1"),
        ({"max_retries": 1.5}, "max_retries=1.5"),
        ({"backoff_factor": 1.0}, "backoff_factor=1.0"),
        ({"backoff_factor": 2}, "backoff_factor=2"),
        ({"backoff_factor": 0.3}, "Use 0.25 or 0.5"),
        ({"backoff_factor": 0}, "backoff_factor=0"),
        ({"min_scale": 3.0}, "min_scale=3.0"),
    ],
)
def test_a_bad_option_is_shown(options, named):
    with pytest.raises(LossScaleOptionError, match=named):
        jaxmp.retry(jaxmp.value_and_grad(loss_fn), **options)


@pytest.mark.parametrize("state", [None, jaxmp.StaticLossScale(8), (), (TX.init(W),)])
def test_what_is_not_the_state_of_loss_scaling_is_named(state):
    step = jaxmp.retry(jaxmp.value_and_grad(loss_fn))
    with pytest.raises(MissingLossScale, match=f"was given a {type(state).__name__}"):
        step(W, X, loss_scale=state)
    with pytest.raises(MissingLossScale, match="loss_scale=opt_state"):
        step(W, X)


def test_two_scales_in_the_state_are_refused():
    state = TX.init(W)._replace(inner_state=TX.init(W))
    step = jaxmp.retry(jaxmp.value_and_grad(loss_fn))
    with pytest.raises(MultipleLossScales, match="2 loss scales"):
        step(W, X, loss_scale=state)
