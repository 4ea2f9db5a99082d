"""Tables that are stored in half: what a frequent row learns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmp
from jaxmp import PolicyRule

TIMES = 5000
IDS = jnp.zeros(TIMES, jnp.int32)
TABLE_IN_HALF = [PolicyRule(kind="embed", params="bfloat16")]


class OwnTable(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return self.param("embedding", nn.initializers.ones, (10, 4))[ids]


def of_linen(apply, dtype):
    """The gradient of the row that is looked up thousands of times."""
    params = {"embedding": jnp.ones((10, 4), dtype)}

    def loss_fn(params):
        return jnp.sum(apply({"params": params}, IDS).astype(jnp.float32))

    return jax.grad(loss_fn)(params)["embedding"][0]


def of_nnx(model):
    def loss_fn(model):
        return jnp.sum(model(IDS).astype(jnp.float32))

    return nnx.grad(loss_fn)(model).embedding[0]


def assert_summed(gradient, dtype):
    assert gradient.dtype == dtype
    np.testing.assert_allclose(np.asarray(gradient, np.float32), TIMES, rtol=4e-3)


@pytest.mark.parametrize("model", [nn.Embed(10, 4), OwnTable()], ids=["Embed", "own"])
@pytest.mark.parametrize("policy", ["bf16-true", "16-true"])
def test_a_frequent_row_of_a_linen_table(model, policy):
    dtype = jaxmp.get_policy(policy).param_dtype
    for apply in (
        jaxmp.apply_policy(model, policy).apply,
        jaxmp.autocast(model.apply, policy),
    ):
        assert_summed(of_linen(apply, dtype), dtype)


def test_a_frequent_row_of_a_table_that_a_rule_stores_in_half():
    model = jaxmp.apply_policy(nn.Embed(10, 4), "mixed_bfloat16", rules=TABLE_IN_HALF)
    assert_summed(of_linen(model.apply, jnp.bfloat16), jnp.bfloat16)


@pytest.mark.parametrize("rules", [TABLE_IN_HALF, ()], ids=["rule", "policy"])
def test_a_frequent_row_of_an_nnx_table(rules):
    policy = "mixed_bfloat16" if rules else "bf16-true"
    model = nnx.Embed(10, 4, rngs=nnx.Rngs(0))
    assert_summed(of_nnx(jaxmp.apply_policy(model, policy, rules=rules)), jnp.bfloat16)


def test_rows_keep_the_compute_dtype():
    model = jaxmp.apply_policy(nn.Embed(10, 4), "bf16-true")
    assert model.init_with_output(jax.random.key(0), IDS)[0].dtype == jnp.bfloat16
