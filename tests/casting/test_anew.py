"""An activation that is computed again is not merged with what was computed before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp._jaxpr.lowering import lowering_for
from jaxmp.casting.run._anew import _rounded, anew


def loss(w, x):
    return jnp.sum(jax.nn.gelu(x @ w, approximate=False) @ w.T)


@pytest.fixture(scope="module")
def traced():
    args = jnp.ones((32, 64)), jnp.ones((16, 32))
    return jax.jit(jax.grad(jaxmp.autocast(loss))).trace(*args)


@pytest.mark.parametrize(
    ("platform", "kind", "roundings", "barriers"),
    [
        ("tpu", "TPU v6 lite", 1, 0),
        ("tpu", "TPU7x", 1, 0),
        ("tpu", "TPU v5", 1, 0),
        ("tpu", "", 1, 0),
        ("tpu", "TPU v5 lite", 0, 0),
        ("tpu", "TPU v5e", 0, 0),
        ("cuda", "NVIDIA H100 80GB HBM3", 0, 1),
        ("cpu", "", 0, 0),
    ],
)
def test_each_compiler_gets_what_it_needs(traced, platform, kind, roundings, barriers):
    with lowering_for(kind):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert (text.count("reduce_precision") > 0) == roundings
    assert (text.count("optimization_barrier") > 0) == barriers


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_the_rounding_changes_no_number(dtype):
    if dtype == jnp.float32:
        x = jnp.array([1e-45, 1.1, -0.0, jnp.inf, jnp.nan, 3e38], dtype)
    else:
        x = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)
    rounded = np.asarray(jax.jit(_rounded)(x).astype(jnp.float32))
    given = np.asarray(x.astype(jnp.float32))
    np.testing.assert_array_equal(rounded, given)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(given))


def test_it_is_differentiated_and_batched():
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(jax.grad(lambda x: (anew(x) ** 2).sum())(x), 2 * x)
    np.testing.assert_array_equal(jax.vmap(anew)(x), x)
