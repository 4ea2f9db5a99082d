"""Half weights in the model, float32 copies in the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmp
from jaxmp._transformations.rounding import split_float32
from jaxmp.errors import (
    HalfParamsWarning,
    MasterWeightsMismatch,
    MissingParams,
    MissingState,
    OptimizerOptionError,
)
from jaxmp.optimizers import (
    check_master_weights,
    get_master_weights,
    load_master_weights,
    master_weights,
)

# Bits are compared of programs in which LLVM may contract other multiplications.
pytestmark = pytest.mark.optimised
KINDS = {
    "bfloat16": ("bfloat16", False),
    "float16": ("float16", False),
    "split": ("bfloat16", True),
}
every_kind = pytest.mark.parametrize(("dtype", "split"), KINDS.values(), ids=KINDS)


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def train(tx, params, grads):
    """Runs over the first axis of `grads`; returns every step's params and state."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    return jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g)[1])(
        params, grads
    )


def test_small_steps_add_up():
    params = jnp.ones(4, jnp.bfloat16)
    grads = jnp.ones((100, 4), jnp.float32)
    lost, _ = train(optax.adam(1e-3), params, grads.astype(jnp.bfloat16))
    kept, state = train(master_weights(optax.adam(1e-3)), params, grads)
    full, _ = train(optax.adam(1e-3), jnp.ones(4), grads)
    assert (lost == 1.0).all()
    np.testing.assert_allclose(state.master, full, rtol=1e-6)
    np.testing.assert_array_equal(kept, full.astype(jnp.bfloat16))


def test_bfloat16_weights_decay_as_in_float32():
    params = jnp.ones(4, jnp.bfloat16)
    grads = jnp.zeros((2000, 4))
    tx = optax.adamw(1e-3, weight_decay=0.01)
    kept, _ = train(master_weights(tx), params, grads)
    full, _ = train(tx, jnp.ones(4), grads)
    np.testing.assert_array_equal(kept[-1], full[-1].astype(jnp.bfloat16))
    assert (kept[-1] < 1).all()


NAN_ON_ZERO = {
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3),
    "adan": optax.adan(1e-3),
    "novograd": optax.novograd(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
    "adafactor": optax.adafactor(1e-3),
    "adabelief": optax.adabelief(1e-3),
}


@pytest.mark.parametrize("tx", NAN_ON_ZERO.values(), ids=NAN_ON_ZERO)
def test_zero_gradients_in_float16_leave_the_weights_finite(tx):
    params = jnp.ones((2, 2), jnp.float16)
    params, _ = train(master_weights(tx), params, jnp.zeros((3, 2, 2), jnp.float16))
    np.testing.assert_allclose(params, 1, rtol=1e-2)


def test_injected_hyperparameters_keep_their_values():
    injected = master_weights(optax.inject_hyperparams(optax.adamw)(1e-3))
    params = jnp.ones(4, jnp.bfloat16)
    grads = jnp.ones((5, 4), jnp.bfloat16)
    state = injected.init(params)
    assert float(state.inner_state.hyperparams["b2"]) == np.float32(0.999)
    ours, _ = train(injected, params, grads)
    theirs, _ = train(master_weights(optax.adamw(1e-3)), params, grads)
    np.testing.assert_array_equal(ours, theirs)


@every_kind
def test_working_weights_are_rounded_masters_on_every_step(dtype, split):
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(8, 50)), dtype)
    grads = jnp.asarray(rng.normal(size=(300, 8, 50)), jnp.float32)
    tx = master_weights(optax.adam(3e-3), split=split)
    working, state = train(tx, params, grads)
    full, _ = train(optax.adam(3e-3), params.astype(jnp.float32), grads)
    masters = get_master_weights(state, working)
    np.testing.assert_array_equal(bits(masters), bits(full))
    rounded = (split_float32(masters)[0] if split else masters).astype(dtype)
    np.testing.assert_array_equal(bits(working), bits(rounded))


@every_kind
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_they_are_for_weights_and_steps_of_any_size(dtype, split, seed):
    rng = np.random.default_rng(seed)
    low = -12 if dtype == "float16" else -100
    sizes = 2.0 ** rng.uniform(low, 3, 64) * rng.choice([-1, 1], 64)
    params = jnp.asarray(sizes, dtype)
    steps = np.asarray(params, np.float64) * rng.uniform(-0.999, 3, (3, 64))
    working, state = small_run[dtype, split](params, jnp.asarray(steps, jnp.float32))
    masters = get_master_weights(state, working)
    rounded = (split_float32(masters)[0] if split else masters).astype(dtype)
    np.testing.assert_array_equal(np.float32(working), np.float32(rounded))


def compiled_run(split):
    tx = master_weights(optax.sgd(1.0), split=split)
    return jax.jit(lambda params, grads: train(tx, params, grads))


small_run = {(dtype, split): compiled_run(split) for dtype, split in KINDS.values()}


@every_kind
def test_a_step_of_nothing_changes_no_bit(dtype, split):
    params = jnp.asarray([1.5, -0.0, 0.0, -2.0], dtype)
    tx = master_weights(optax.sgd(1.0), split=split)
    updates, _ = tx.update(jnp.zeros(4), tx.init(params), params)
    assert jnp.signbit(updates).all()
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(bits(moved), bits(params))


def test_split_state_is_two_bytes_per_parameter():
    params = {"w": jnp.ones((16, 16), jnp.bfloat16)}
    state = master_weights(optax.sgd(0.1), split=True).init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 2 * 256


def test_split_of_float16_is_refused_by_name():
    tx = master_weights(optax.sgd(0.1), split=True)
    with pytest.raises(
        OptimizerOptionError, match=r"float16 parameter 'a/w'.*bfloat16"
    ):
        tx.init({"a": {"w": jnp.ones(2, jnp.float16)}})


def test_float32_and_integer_parameters_have_no_master():
    params = {"norm": jnp.ones(2), "w": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(3)}
    grads = {"norm": jnp.ones(2), "w": jnp.ones(2), "n": jnp.int32(0)}
    tx = master_weights(optax.sgd(0.25))
    state = tx.init(params)
    assert isinstance(state.master["norm"], optax.MaskedNode)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    assert params["norm"].tolist() == params["w"].tolist() == [0.75, 0.75]
    assert params["norm"].dtype == jnp.float32


@pytest.mark.parametrize("as_function", [False, True])
def test_frozen_parts_have_neither_master_nor_moments(as_function):
    params = {
        "base": {"w": jnp.full((4, 4), -0.0, jnp.bfloat16)},
        "lora": {"a": jnp.ones((4, 1), jnp.bfloat16)},
    }
    mask = {"base": False, "lora": True}
    tx = master_weights(
        optax.adamw(1e-2), trainable=(lambda _: mask) if as_function else mask
    )
    tx = jaxmp.loss_scaling(tx, "mixed_bfloat16")
    state = tx.init(params)
    sizes = [x.size for x in jax.tree.leaves(state) if x.ndim]
    assert sizes == [4, 4, 4]
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(bits(moved["base"]["w"]), bits(params["base"]["w"]))
    assert (moved["lora"]["a"] < 1).all()


def test_without_parameters_the_error_shows_the_call():
    tx = master_weights(optax.sgd(0.1))
    params = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(MissingParams, match=r"tx.update\(grads, state, params\)"):
        tx.update(jnp.ones(2), tx.init(params))


@pytest.mark.parametrize(
    ("first", "then"), [("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_other_dtypes_than_at_init_are_an_error_that_names_the_leaf(first, then):
    tx = master_weights(optax.sgd(0.1))
    state = tx.init({"w": jnp.ones(2, first)})
    with pytest.raises(MasterWeightsMismatch, match=f"'w' is {then}.*tx.init"):
        tx.update({"w": jnp.ones(2)}, state, {"w": jnp.ones(2, then)})


@pytest.mark.parametrize("split", [False, True])
def test_load_starts_from_float32_parameters_without_loss(split):
    weights = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    weights["w"] = weights["w"].at[0, 0].set(1 + 2.0**-8)  # a tie of bfloat16
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    tx = jaxmp.loss_scaling(
        master_weights(optax.adamw(1e-3), split=split), "mixed_bfloat16"
    )
    params, state = load_master_weights(tx.init(params), params, weights)
    loaded = get_master_weights(state, params)
    np.testing.assert_array_equal(bits(loaded["w"]), bits(weights["w"]))
    check_master_weights(state, params)


def test_load_keeps_moments():
    params = jnp.ones(2, jnp.bfloat16)
    tx = master_weights(optax.adam(1e-3))
    _, state = tx.update(jnp.ones(2), tx.init(params), params)
    _, loaded = load_master_weights(state, params, jnp.full(2, 0.3))
    np.testing.assert_array_equal(loaded.inner_state[0].mu, state.inner_state[0].mu)


def test_a_checkpoint_of_two_steps_is_an_error_that_names_the_leaf():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
    state = master_weights(optax.adam(1e-3)).init(params)
    one_unit_off = {**params, "b": params["b"] + jnp.bfloat16(2.0**-7)}
    check_master_weights(state, one_unit_off)
    other = {**params, "b": params["b"].at[1].set(1.5)}
    with pytest.raises(
        MasterWeightsMismatch, match=r"1 of 3 weights of 'b'.*1.5.*\[1\]"
    ):
        check_master_weights(state, other)
    wide = {**params, "b": jnp.ones(3)}
    with pytest.raises(MasterWeightsMismatch, match=r"'b' are float32"):
        check_master_weights(state, wide)


def test_a_weight_that_collapsed_in_one_step_is_no_mismatch():
    params = jnp.asarray([1.0, 1.0], jnp.bfloat16)
    tx = master_weights(optax.sgd(1.0))
    grads = jnp.asarray([1 - 3e-8, 0.5], jnp.float32)
    updates, state = tx.update(grads, tx.init(params), params)
    check_master_weights(state, optax.apply_updates(params, updates))


@pytest.mark.parametrize(
    "function", [lambda s, p: get_master_weights(s, p), check_master_weights]
)
def test_a_state_without_masters_is_an_error(function):
    params = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(MissingState, match=r"jaxmp.master_weights"):
        function(optax.adam(1e-3).init(params), params)


@pytest.mark.parametrize(
    "wrapper",
    [
        master_weights,
        lambda tx: master_weights(tx, split=True),
        lambda tx: jaxmp.stochastic_rounding(tx, seed=0),
        lambda tx: optax.chain(
            optax.clip(1.0), master_weights(jaxmp.accumulate(tx, 2))
        ),
    ],
)
def test_half_parameters_give_no_warning_where_nothing_is_lost(wrapper):
    params = jnp.ones(2, jnp.bfloat16)
    jaxmp.loss_scaling(wrapper(optax.adam(1e-3)), "mixed_float16").init(params)
    with pytest.warns(HalfParamsWarning, match="master_weights"):
        jaxmp.loss_scaling(optax.adam(1e-3), "mixed_float16").init(params)
