"""The compiled update grows with the number of leaves, not with its square."""

import jax
import jax.numpy as jnp
import optax

import jaxmp


def instructions(leaves):
    tx = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16")

    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [jnp.ones((4, 8)) for _ in range(leaves)]
    compiled = jax.jit(update).lower(params, tx.init(params), params).compile()
    return compiled.as_text().count(" = ")


def test_the_finite_check_is_compiled_once_for_all_leaves():
    few, many = instructions(10), instructions(40)
    assert many < 5 * few
