"""Everything that names a line of code names the same one: the user's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxmp
from jaxmp import numerics, report
from jaxmp._jaxpr.sources import Source

X = jnp.ones((2, 4))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        x = nn.relu(nn.LayerNorm()(x))
        return nn.Dense(2)(x)


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.up(x))
        return self.down(x)


def linen_call():
    model = Linen()
    variables = model.init(jax.random.key(0), X)
    return lambda variables, x: jnp.sum(model.apply(variables, x)), variables


def nnx_call():
    return lambda model, x: jnp.sum(model(x)), Nnx()


def scanned_call():
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return lambda w, x: jnp.sum(jax.lax.scan(layer, x, w)[0]), jnp.ones((3, 4, 4))


def lines_of_matmuls(fn, model):
    """Of every matmul in the forward pass, by each of those who look at a program."""
    explained = jaxmp.explain(fn)(model, X).rows
    audited = report.audit(fn, model, X).matmuls
    traced = numerics.trace(fn)(model, X).rows
    return {
        "explain": {r.source for r in explained if r.operation == "dot_general"},
        "audit": {str(r.source) for r in audited if not r.is_backward},
        "trace": {
            str(Source(r.file, r.line, r.function))
            for r in traced
            if r.operation == "dot_general" and not r.is_backward
        },
    }


@pytest.mark.parametrize("make", [linen_call, nnx_call, scanned_call])
def test_explain_audit_and_trace_name_the_same_lines(make):
    found = lines_of_matmuls(*make())
    assert found["explain"] == found["audit"] == found["trace"]
    assert all(line.startswith("test_user_line.py:") for line in found["explain"])
