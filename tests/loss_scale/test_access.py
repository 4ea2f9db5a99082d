"""Accessors of a loss scale's state: in a step, on the host, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.errors import (
    LossScaleCollapsed,
    LossScaleOptionError,
    MissingLossScale,
    MultipleLossScales,
    NotOnHost,
)

TX = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16", growth_interval=3)
W = jnp.ones(3)


def after(*grads, value=None):
    state = TX.init(W)
    for grad in grads:
        _, state = TX.update(jnp.full(3, grad), state, W, value=value)
    return state


READERS = {
    "get_loss_scale": jaxmp.get_loss_scale,
    "scale_loss": lambda state: jaxmp.scale_loss(jnp.float32(1), state),
    "loss_scale_metrics": jaxmp.loss_scale_metrics,
    "select_applied": lambda state: jaxmp.select_applied(state, 1, 0),
    "raise_if_collapsed": lambda s: jaxmp.raise_if_collapsed(
        s, max_consecutive_skips=5
    ),
}


@pytest.mark.parametrize("read", READERS)
def test_a_state_without_a_scale_is_refused_by_type(read):
    for state in ((), optax.adam(0.1).init(W), None):
        with pytest.raises(MissingLossScale) as error:
            READERS[read](state)
        assert f"this {type(state).__name__}" in str(error.value)
        assert "jaxmp.loss_scaling(optimizer, policy)" in str(error.value)


@pytest.mark.parametrize("read", READERS)
def test_a_state_with_several_scales_is_refused_with_their_number(read):
    with pytest.raises(MultipleLossScales, match="There are 3 loss scales"):
        READERS[read]([TX.init(W)] * 3)


@pytest.mark.parametrize("read", READERS)
def test_a_scale_is_found_however_deep(read):
    READERS[read]({"a": [None, (TX.init(W), jnp.ones(2))]})


@pytest.mark.parametrize("read", ["loss_scale_metrics", "select_applied"])
def test_a_jmp_scale_counts_no_steps(read):
    with pytest.raises(MissingLossScale, match="A StaticLossScale counts no steps"):
        READERS[read](jaxmp.StaticLossScale(8))


def test_metrics_of_a_history():
    state = after(1.0, 1.0, 1.0, jnp.nan, jnp.inf)
    metrics = jaxmp.loss_scale_metrics(state)
    assert {name: x.item() for name, x in metrics.items()} == {
        "loss_scale": 2.0**15,
        "grads_finite": False,
        "applied_steps": 3,
        "skipped_steps": 2,
        "consecutive_skips": 2,
    }


def test_metrics_select_and_scale_run_in_a_compiled_step_without_a_transfer():
    @jax.jit
    def step(state, grads, stats):
        _, state = TX.update(grads, state, W)
        new = jaxmp.select_applied(state, stats + 1, stats)
        return state, new, jaxmp.loss_scale_metrics(state), jaxmp.get_loss_scale(state)

    stats, state, bad = jnp.zeros(2), TX.init(W), jnp.full(3, jnp.nan)
    step(state, bad, stats)
    with jax.transfer_guard("disallow"):
        state, new, metrics, scale = step(state, bad, stats)
    np.testing.assert_array_equal(new, stats)
    assert float(metrics["loss_scale"]) == float(scale) == 2.0**15


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (jnp.int32(8), jnp.int32(7)),
        (8, 7),
        (2.5, 1.5),
        (jnp.float32(jnp.nan), jnp.float32(1)),
        (True, False),
        (np.float32(jnp.inf), np.float32(0)),
    ],
)
def test_select_applied_takes_arrays_and_python_numbers(new, old):
    np.testing.assert_array_equal(jaxmp.select_applied(after(1.0), new, old), new)
    np.testing.assert_array_equal(jaxmp.select_applied(after(jnp.inf), new, old), old)


def test_select_applied_passes_trees_keys_and_none():
    new = {"stats": jnp.ones(2), "key": jax.random.key(1), "none": None}
    old = {"stats": jnp.zeros(2), "key": jax.random.key(0), "none": None}
    kept = jaxmp.select_applied(after(jnp.nan), new, old)
    np.testing.assert_array_equal(kept["stats"], 0.0)
    assert kept["key"] == old["key"]
    assert kept["none"] is None


def test_scale_loss_is_in_float32_and_leaves_the_scale_of_float16_to_the_caller():
    state = after()
    assert jaxmp.scale_loss(jnp.float16(2), state) == 2.0**17
    assert jaxmp.scale_loss(jnp.bfloat16(2), state).dtype == jnp.float32
    assert jaxmp.scale_loss(2.0, state) == 2.0**17


def test_scaling_by_hand_equals_value_and_grad_bit_for_bit():
    def loss_fn(w):
        half = w.astype(jnp.float16)
        return jnp.sum((half * half).astype(jnp.float32)) * 1e-4

    tx = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16")
    by_hand = jaxmp.loss_scaling(
        optax.adam(0.1), "mixed_float16", grads_are_scaled=True
    )
    w, state, hand_state = W, tx.init(W), by_hand.init(W)
    hand_w = w
    for scale_up in (1.0, 1e9, 1.0):  # the middle one overflows

        def scaled(w, up=scale_up):
            return loss_fn(w) * up

        loss, grads = jaxmp.value_and_grad(scaled)(w, loss_scale=state)
        updates, state = tx.update(grads, state, w, value=loss)
        w = optax.apply_updates(w, updates)
        hand_grads = jax.grad(lambda w, state: jaxmp.scale_loss(scaled(w), state))(
            hand_w, hand_state
        )
        updates, hand_state = by_hand.update(hand_grads, hand_state, hand_w, value=loss)
        hand_w = optax.apply_updates(hand_w, updates)
    np.testing.assert_array_equal(w, hand_w)
    for ours, theirs in zip(
        jax.tree.leaves(state), jax.tree.leaves(hand_state), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert int(state.skipped_steps) == 1


# Collapse

CAUSES = [
    (None, "Whether the loss itself was non-finite is not known", "value=loss"),
    (1.0, "only gradients overflowed", "min_scale"),
    (jnp.nan, "The loss itself was non-finite", "no loss scale can help"),
    (jnp.inf, "The loss itself was non-finite", "bfloat16"),
]


@pytest.mark.parametrize(("value", "cause", "repair"), CAUSES)
def test_a_collapse_names_its_cause(value, cause, repair):
    state = after(*[jnp.nan] * 4, value=value)
    jaxmp.raise_if_collapsed(state, max_consecutive_skips=5)
    with pytest.raises(LossScaleCollapsed) as error:
        jaxmp.raise_if_collapsed(state, max_consecutive_skips=4)
    message = str(error.value)
    assert "The last 4 steps were all skipped; the loss scale is now 4096." in message
    assert cause in message
    assert repair in message


def test_an_applied_step_ends_the_count():
    state = after(*[jnp.nan] * 9, 1.0, jnp.nan)
    jaxmp.raise_if_collapsed(state, max_consecutive_skips=2)


def test_the_worst_member_of_an_ensemble_counts():
    states = jax.tree.map(
        lambda *x: jnp.stack(x),
        after(1.0),
        after(*[jnp.inf] * 3, value=1.0),
        after(1.0),
    )
    with pytest.raises(LossScaleCollapsed) as error:
        jaxmp.raise_if_collapsed(states, max_consecutive_skips=3)
    assert "(ensemble member 1)" in str(error.value)
    assert "only gradients overflowed" in str(error.value)


def test_inside_of_a_compiled_function_it_says_where_to_call_it():
    @jax.jit
    def step(state):
        jaxmp.raise_if_collapsed(state, max_consecutive_skips=1)

    with pytest.raises(NotOnHost, match=r"outside jit"):
        step(after())


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_a_count_that_would_always_raise_is_refused(count):
    with pytest.raises(LossScaleOptionError, match="max_consecutive_skips="):
        jaxmp.raise_if_collapsed(after(), max_consecutive_skips=count)
