"""Networks of the zoo on real data: half precision ends where float32 does."""

import functools
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import jaxmp
from jaxmp.testing import zoo

from .conftest import module_under

pytestmark = pytest.mark.slow

STEPS, BATCH = 200, 64
MODELS = {str(model): model for model in zoo()}
# What each network is given: digits as images, as rows or flat, or text.
TASKS = {
    "mlp-linen": "flat",
    "mlp-nnx": "flat",
    "cnn-linen": "images",
    "cnn-nnx": "images",
    "lstm-linen": "rows",
    "gru-nnx": "rows",
    "mixture_of_experts-linen": "flat",
    "decoder-linen": "text",
    "decoder-nnx": "text",
}


@functools.cache
def batches(task):
    """Inputs and targets of every step, the same for each policy."""
    rng = np.random.default_rng(0)
    if task == "text":
        text = "".join(pydoc_data.topics.topics.values()).lower()
        common = sorted(set(text), key=text.count, reverse=True)[:19]
        number = {letter: i for i, letter in enumerate(common)}
        tokens = np.array([number.get(letter, 19) for letter in text], np.int32)
        starts = rng.integers(0, len(tokens) - 12, (STEPS, BATCH))
        windows = tokens[starts[..., None] + np.arange(12)]
        return windows, windows
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype(np.float32)
    chosen = rng.integers(0, len(images), (STEPS, BATCH))
    shape = {"flat": (64,), "rows": (8, 8), "images": (8, 8, 1)}[task]
    inputs = images[chosen].reshape(STEPS, BATCH, *shape)
    return inputs, labels[chosen].astype(np.int32)


@functools.cache
def losses(name, policy):
    """The loss of every step of a training under a policy; None: no policy at all."""
    model = MODELS[name]
    apply, params, state = model.functional(module_under(model, policy))
    optimizer = jaxmp.loss_scaling(
        optax.adam(3e-3), policy or "float32", init_scale=2.0**15
    )

    def step(carry, batch):
        params, state, opt_state = carry
        inputs, target = batch

        def loss_fn(params):
            output, new_state = apply(params, state, inputs)
            return model.loss(output, target), new_state

        value_and_grad = jaxmp.value_and_grad(loss_fn, has_aux=True)
        (loss, new_state), grads = value_and_grad(params, loss_scale=opt_state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, new_state, opt_state), loss

    start = params, state, optimizer.init(params)
    return np.asarray(jax.jit(lambda *x: jax.lax.scan(step, *x)[1])(start, data(name)))


def data(name):
    return jax.tree.map(jnp.asarray, batches(TASKS[name]))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", TASKS)
def test_trains_to_the_loss_of_float32(name, policy):
    plain, half = losses(name, None), losses(name, policy)
    first, last = plain[:5].mean(), plain[-30:].mean()
    print(f"{name} {policy}: {first:.3f} -> {last:.4f}, {half[-30:].mean():.4f}")
    assert last < 0.8 * first
    # Of what float32 has learned, half has learned all but two per cent.
    assert abs(half[-30:].mean() - last) < 0.02 * (first - last)
