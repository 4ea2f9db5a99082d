"""Weights on several devices: one copy in half, gradients in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmp

WORDS, WIDTH = 64, 32
TOKENS = jax.random.randint(jax.random.key(0), (8, 17), 0, WORDS)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(WORDS, WIDTH, name="table")
        x = table(tokens)
        x = x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(128, name="up")(x)))
        return table.attend(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 128, rngs=rngs)
        self.down = nnx.Linear(128, WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.table(tokens)
        return self.table.attend(x + self.down(nnx.gelu(self.up(x))))


def loss_of(logits):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), TOKENS[:, 1:]
    )
    return losses.mean()


def linen_loss(policy, under):
    model = Linen()
    params = model.init(jax.random.key(1), TOKENS)
    if under == "apply_policy":
        model = jaxmp.apply_policy(model, policy)
    return params, lambda params: loss_of(model.apply(params, TOKENS[:, :-1]))


def nnx_loss(policy, under):
    model = Nnx(nnx.Rngs(0))
    if under == "apply_policy":
        model = jaxmp.apply_policy(model, policy)
    graph, params = nnx.split(model)
    return params, lambda params: loss_of(nnx.merge(graph, params)(TOKENS[:, :-1]))


def loss_and_params(written, under, policy):
    params, loss_fn = written(policy, under)
    if under == "autocast":
        loss_fn = jaxmp.autocast(loss_fn, policy)
    return loss_fn, params


WAYS = [(linen_loss, "apply_policy"), (nnx_loss, "apply_policy")]
WAYS.append((linen_loss, "autocast"))
IDS = ["linen", "nnx", "autocast"]


def matmuls_of(jaxpr):
    """The matmuls of a jaxpr, and of all that it calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from matmuls_of(inner)


@pytest.mark.parametrize("reduce", ["", ",reduce=float32"], ids=["compute", "float32"])
@pytest.mark.parametrize(("written", "under"), WAYS, ids=IDS)
def test_a_tied_table_is_cast_once_and_read_without_a_transpose(written, under, reduce):
    # Devices would gather a table and its transpose apart.
    loss_fn, params = loss_and_params(written, under, f"mixed_bfloat16{reduce}")
    jaxpr = jax.make_jaxpr(loss_fn)(params).jaxpr
    shapes = [[v.aval.shape for v in eqn.invars] for eqn in matmuls_of(jaxpr)]
    assert any((WORDS, WIDTH) in operands for operands in shapes)
    assert not any((WIDTH, WORDS) in operands for operands in shapes)
    casts = [
        eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "convert_element_type"
        and eqn.outvars[0].aval.shape == (WORDS, WIDTH)
    ]
    assert len(casts) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("written", "under"), WAYS, ids=IDS)
def test_float32_gradients_run_on_a_cpu_and_are_right(written, under, dtype):
    # XLA for CPUs moves the transpose of such a gradient into the matmul, and then has
    # no code for it: here two layers, one as wide as the table.
    loss_fn, params = loss_and_params(written, under, f"mixed_{dtype},reduce=float32")
    grads = jax.jit(jax.grad(loss_fn))(params)
    plain_fn, plain = loss_and_params(written, "", "float32")
    expected = jax.jit(jax.grad(plain_fn))(plain)
    for grad, exact in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        assert grad.dtype == jnp.float32
        size = np.abs(exact).max()
        np.testing.assert_allclose(grad, exact, atol=0.05 * size)
