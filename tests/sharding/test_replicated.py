"""Gradients of weights that every device has are summed in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.sharding import reduce_gradients, replicated
from jaxmp.testing import equations

pytestmark = pytest.mark.devices(8)

WAYS = ("plain", "inside the loss", "outside")


@functools.cache
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def gradient(way, weight_dtype=jnp.float32):
    """True gradients of a mean over devices, under a loss scale."""

    def fn(w, x, scale):
        def loss_fn(w):
            if way == "inside the loss":
                w = replicated(w, "data")
            y = x.astype(jnp.float16) @ w.astype(jnp.float16)
            return jax.lax.pmean(jnp.mean(y.astype(jnp.float32)), "data")

        def local_loss_fn(w):
            y = x.astype(jnp.float16) @ w.astype(jnp.float16)
            return jnp.mean(y.astype(jnp.float32))

        if way == "outside":
            w = replicated(w, "data")
            _, grads = jaxmp.value_and_grad(local_loss_fn)(w, loss_scale=scale)
            return reduce_gradients(grads, "data")
        _, grads = jaxmp.value_and_grad(loss_fn)(w, loss_scale=scale)
        return grads

    return jax.shard_map(fn, mesh=mesh(), in_specs=(P(), P("data"), P()), out_specs=P())


@functools.cache
def highest_scale(way):
    """The largest power of two whose gradients are finite on every device."""
    fn = jax.jit(gradient(way))
    w = jnp.zeros((4, 1))
    x = jnp.full((8 * 4, 4), 8.0)

    def is_finite(exponent):
        scale = jaxmp.StaticLossScale(2.0**exponent)
        grads = fn(w, x, scale)
        if bool(jnp.all(jnp.isfinite(grads))):
            np.testing.assert_allclose(grads, np.full((4, 1), 8.0), rtol=2e-3)
            return True
        return False

    return max(exponent for exponent in range(24) if is_finite(exponent))


def test_eight_devices_lose_no_bit_of_range():
    """The gradient is 8, and each device's part of it, before the sum, is 1.

    float16 ends below 2^16. So a sum of 8 times the scale has 2^12 at most, and parts
    of once the scale have 2^15. Outside the loss no part is divided before the sum.
    """
    assert highest_scale("plain") == 12
    assert highest_scale("inside the loss") == 15
    assert highest_scale("outside") == 12


def sums(way, dtype):
    args = jnp.zeros((4, 1), dtype), jnp.ones((32, 4)), jaxmp.StaticLossScale(8.0)
    return [
        eqn.invars[0].aval.dtype.name
        for _, eqn in equations(jax.make_jaxpr(gradient(way))(*args))
        if eqn.primitive.name.startswith("psum") and eqn.invars[0].aval.ndim
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_sum_is_in_float32_for_weights_of_any_dtype(dtype):
    assert sums("plain", dtype) == ["float16"]
    assert sums("inside the loss", dtype) == ["float32"]
    assert sums("outside", dtype) == ["float32"]


@pytest.mark.parametrize("check_vma", [True, False])
def test_weights_are_the_same_and_other_leaves_pass(check_vma):
    tree = {"w": jnp.arange(3.0), "h": jnp.ones(2, jnp.bfloat16), "n": 3, "none": None}

    def fn(w, h):
        found = replicated({**tree, "w": w, "h": h}, "data")
        assert found["n"] == 3
        assert found["none"] is None
        assert found["h"].dtype == jnp.bfloat16
        again = replicated(found, ("data",))
        return again["w"]

    found = jax.shard_map(
        fn, mesh=mesh(), in_specs=P(), out_specs=P("data"), check_vma=check_vma
    )(tree["w"], tree["h"])
    np.testing.assert_array_equal(found, np.tile(tree["w"], 8))
