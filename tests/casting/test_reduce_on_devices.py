"""Gradients over eight devices are those of one, and travel in the dtype asked for."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from tests.support.programs.weights import layer, normal

pytestmark = pytest.mark.devices(8)

# The same roundings of activations in every program, or these hide those of sums.
OPTIONS = {
    "xla_allow_excess_precision": False,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
PARAMS = {
    "table": normal(0, 64, 16),
    "up": normal(1, 16, 32),
    "down": normal(2, 32, 16),
}
TOKENS = jax.random.randint(jax.random.key(3), (16, 4), 0, 64)
LAYOUTS = {"data parallel": P(), "fully sharded": P("data")}
POLICIES = ("mixed_bfloat16", "mixed_float16")


def loss_fn(params, tokens):
    x = params["table"][tokens]
    x = x + layer(x, params["up"]) @ params["down"]
    # A mean over all rows of all devices.
    return -jax.nn.log_softmax(x @ params["table"].T)[..., 0].mean()


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@functools.cache
def gradients(policy, layout, factor=1.0):
    """The compiled text, and the gradients times a factor, under a scale of 2^13."""
    cast = jaxmp.autocast(lambda p, t: loss_fn(p, t) * factor, policy)
    scale = jaxmp.StaticLossScale(2.0**13 if "mixed_float16" in policy else 1.0)

    def run(params, tokens):
        return jaxmp.value_and_grad(cast)(params, tokens, loss_scale=scale)[1]

    if layout is None:
        return "", jax.jit(run, compiler_options=OPTIONS)(PARAMS, TOKENS)
    weights = NamedSharding(mesh(), LAYOUTS[layout])
    rows = NamedSharding(mesh(), P("data"))
    compiled = (
        jax.jit(run, in_shardings=(weights, rows), out_shardings=weights)
        .lower(PARAMS, TOKENS)
        .compile(OPTIONS)
    )
    params = jax.device_put(PARAMS, weights)
    return compiled.as_text(), compiled(params, jax.device_put(TOKENS, rows))


def ulp(dtype):
    return float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduce", ["", ",reduce=float32"])
@pytest.mark.parametrize("half", POLICIES)
def test_eight_devices_give_the_gradients_of_one(half, reduce, layout):
    """To two units in the last place of the reduce dtype, times the root of eight."""
    policy = half + reduce
    _, one = gradients(policy, None)
    _, eight = gradients(policy, layout)
    dtype = "float32" if reduce else half.removeprefix("mixed_")
    for name in PARAMS:
        x, y = np.asarray(eight[name], np.float64), np.asarray(one[name], np.float64)
        assert eight[name].dtype == jnp.float32
        # A sum that cancels keeps the rounding of its terms.
        assert np.abs(x - y).max() <= 2 * ulp(dtype) * 8**0.5 * np.abs(y).max(), name


def gathers(text):
    found = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather(?:-start)?\(", text)
    return collections.Counter(found)


@pytest.mark.parametrize("half", POLICIES)
def test_gathers_do_not_change_with_the_reduce_dtype(half):
    plain = gathers(gradients(half, "fully sharded")[0])
    wide = gathers(gradients(f"{half},reduce=float32", "fully sharded")[0])
    assert plain
    assert plain == wide


@pytest.mark.parametrize("reduce", ["", ",reduce=float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_gradient_is_summed_in_unscaled_float16(layout, reduce):
    """Gradients that float16 cannot hold come through, since they travel scaled."""
    small = 2.0**-12
    policy = f"mixed_float16{reduce}"
    _, expected = gradients("mixed_bfloat16", None)
    _, found = gradients(policy, layout, small)
    for name in PARAMS:
        x, y = np.asarray(found[name]) / small, np.asarray(expected[name])
        assert np.linalg.norm(x - y) < 0.03 * np.linalg.norm(y), name
