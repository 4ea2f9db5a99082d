"""Arithmetic that public layers write by hand, and that half gets wrong in silence."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp

from .measures import POLICIES

MANY = 3000
# One rounding of each that a result may meet on its way: as a sum, and as a product.
TWO_ROUNDINGS = 2**-7
policies = pytest.mark.parametrize("policy", POLICIES)
ways = pytest.mark.parametrize("way", ["autocast", "apply_policy"])
again = pytest.mark.parametrize("again", [False, True], ids=["last", "then_a_matmul"])


class Layer(nn.Module):
    """A matmul with one weight, what is to be tried, and if wanted a matmul again."""

    function: Callable[[Any], Any]
    again: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1],) * 2)
        kernel = kernel.astype(self.dtype)
        y = self.function(jnp.asarray(x, self.dtype) @ kernel)
        return y @ kernel if self.again else y


def run(way: str, policy: str, module: nn.Module, variables: Any, *inputs: Any) -> Any:
    """The output of a module under a policy, one way or the other."""
    if way == "apply_policy":
        return jaxmp.apply_policy(module, policy).apply(variables, *inputs)
    return jaxmp.autocast(module.apply, policy)(variables, *inputs)


def output_and_gradient(way: str, policy: str, layer: Layer, x: Any) -> tuple[Any, Any]:
    """What a layer of unit weights returns, and its sum's gradient in its input."""
    variables = {"params": {"kernel": jnp.eye(x.shape[1])}}

    def summed(x: Any) -> Any:
        y = run(way, policy, layer, variables, x)
        return jnp.sum(y), y

    gradient, output = jax.jit(jax.grad(summed, has_aux=True))(x)
    return output, gradient


def _segments(x: Any) -> Any:
    return jax.ops.segment_sum(x, jnp.zeros(len(x), jnp.int32), 2)


def _at_add(x: Any) -> Any:
    return jnp.zeros((2, x.shape[1]), x.dtype).at[jnp.zeros(len(x), jnp.int32)].add(x)


def _scan(x: Any) -> Any:
    start = jnp.zeros(x.shape[1], x.dtype)
    return jax.lax.scan(lambda total, row: (total + row, None), start, x)[0]


def _fori(x: Any) -> Any:
    def body(i: Any, total: Any) -> Any:
        return total + x[i]

    return jax.lax.fori_loop(0, len(x), body, jnp.zeros(x.shape[1], x.dtype))


def _moving(x: Any) -> Any:
    """An average of decay 1 with what is added to it: again a sum."""

    def body(total: Any, row: Any) -> Any:
        return 1.0 * total + row, None

    return jax.lax.scan(body, jnp.zeros(x.shape[1], x.dtype), x)[0]


def _cumulative(x: Any) -> Any:
    return jnp.cumsum(x, 0)[-1]


SUMS = {
    "segment_sum": _segments,
    "at_add": _at_add,
    "scan": _scan,
    "fori": _fori,
    "moving": _moving,
    "cumsum": _cumulative,
    "sum": lambda x: jnp.sum(x, 0),
    "mean": lambda x: len(x) * jnp.mean(x, 0),
}


@policies
@ways
@again
@pytest.mark.parametrize("sum_by", SUMS)
def test_a_sum_of_three_thousand_ones_is_three_thousand(sum_by, again, way, policy):
    # A loop with a counter has no gradient, and none is needed to see what it sums to.
    forward = functools.partial(run, way, policy, Layer(SUMS[sum_by], again))
    variables = {"params": {"kernel": jnp.eye(8)}}
    output = jax.jit(forward)(variables, jnp.ones((MANY, 8)))
    np.testing.assert_allclose(output.max(), MANY, rtol=TWO_ROUNDINGS)


def _in_a_scan(x: Any) -> Any:
    def body(total: Any, _: Any) -> Any:
        return total + 0.125 * x[0], None

    return jax.lax.scan(body, jnp.zeros_like(x[0]), None, MANY)[0]


ROWS = np.zeros(MANY, np.int32)
REPEATS = {
    "index": lambda x: 0.125 * x[ROWS],
    "index_last": lambda x: (0.125 * x)[ROWS],
    "take": lambda x: 0.125 * jnp.take(x, ROWS, 0),
    "broadcast": lambda x: 0.125 * jnp.broadcast_to(x[:1], (MANY, 8)),
    "scan": _in_a_scan,
}


@policies
@ways
@again
@pytest.mark.parametrize("repeat_by", REPEATS)
def test_a_gradient_of_three_thousand_uses_is_three_hundred_and_seventy_five(
    repeat_by, again, way, policy
):
    """Of one row, used 3000 times with a weight of an eighth."""
    layer = Layer(REPEATS[repeat_by], again)
    _, gradient = output_and_gradient(way, policy, layer, jnp.ones((2, 8)))
    np.testing.assert_allclose(gradient[0], 375, rtol=TWO_ROUNDINGS)


@policies
@ways
def test_a_loss_inside_is_in_float32(way, policy):
    """Of 3000 words, with logits that differ by less than half can tell."""

    class Model(nn.Module):
        dtype: Any = jnp.float32

        @nn.compact
        def __call__(self, x, labels):
            logits = nn.Dense(64, dtype=self.dtype)(x)
            log_probabilities = logits - jax.nn.logsumexp(logits, -1, keepdims=True)
            chosen = jnp.take_along_axis(log_probabilities, labels[:, None], -1)
            return -jnp.mean(chosen)

    x = jax.random.normal(jax.random.key(0), (MANY, 8))
    labels = jax.random.randint(jax.random.key(1), (MANY,), 0, 64)
    variables = Model().init(jax.random.key(2), x, labels)
    expected = Model().apply(variables, x, labels)
    loss = run(way, policy, Model(), variables, x, labels)
    assert loss.dtype == jnp.float32
    # Rounded to half, it would be off by as much as 0.4 % or 0.05 %.
    np.testing.assert_allclose(loss, expected, rtol=5e-5)


@policies
@ways
def test_a_clip_that_keeps_a_logarithm_finite_keeps_it(way, policy):
    def survival(x: Any) -> Any:
        return -jnp.log1p(-jnp.clip(jax.nn.sigmoid(x), 1e-6, 1 - 1e-6))

    x = jnp.linspace(-30, 30, 64).reshape(8, 8)
    output, gradient = output_and_gradient(way, policy, Layer(survival), x)
    expected, _ = output_and_gradient("autocast", "float32", Layer(survival), x)
    assert bool(jnp.isfinite(gradient).all())
    np.testing.assert_allclose(output, expected, rtol=0.05, atol=2e-3)


class WeightNorm(nn.Module):
    """As the speech and flow models write it."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        v = self.param("v", nn.initializers.ones, (x.shape[-1], 8))
        g = self.param("g", nn.initializers.ones, (8,))
        kernel = g * v / jnp.linalg.norm(v, axis=0)
        return jnp.asarray(x, self.dtype) @ kernel.astype(self.dtype)


@policies
@ways
def test_weight_norm_by_hand_survives_the_squares(way, policy):
    """Its vector has the length 240, and 240 squared is near what float16 can hold."""
    draw = jax.random.normal(jax.random.key(0), (900, 8))
    params = {"v": 7.8 * draw, "g": jnp.linspace(1, 2, 8)}
    assert 225 < float(jnp.linalg.norm(params["v"], axis=0).max()) < 255
    x = jax.random.normal(jax.random.key(1), (16, 900))
    expected = WeightNorm().apply({"params": params}, x)
    output = run(way, policy, WeightNorm(), {"params": params}, x)
    np.testing.assert_allclose(output, expected, atol=0.03)


class Standardised(nn.Module):
    """A convolution whose weights are standardised, as in BiT and NFNets."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        shape = (3, 3, images.shape[-1], 16)
        kernel = self.param("kernel", nn.initializers.normal(1e-4), shape)
        mean = kernel.mean((0, 1, 2), keepdims=True)
        variance = kernel.var((0, 1, 2), keepdims=True)
        kernel = (kernel - mean) / jnp.sqrt(variance + 1e-10)
        return jax.lax.conv_general_dilated(
            jnp.asarray(images, self.dtype),
            kernel.astype(self.dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


@policies
@ways
def test_weight_standardisation_of_small_weights_is_that_of_float32(way, policy):
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    variables = Standardised().init(jax.random.key(1), images)

    def loss(apply: Callable[..., Any], variables: Any) -> Any:
        return jnp.mean(apply(variables, images) ** 2)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_grad(apply: Callable[..., Any], variables: Any) -> Any:
        return jax.value_and_grad(loss, argnums=1)(apply, variables)

    half = functools.partial(run, way, policy, Standardised())
    value, gradient = value_and_grad(half, variables)
    full, full_gradient = value_and_grad(Standardised().apply, variables)
    np.testing.assert_allclose(value, full, rtol=0.02)
    found, wanted = (g["params"]["kernel"] for g in (gradient, full_gradient))
    assert bool(jnp.isfinite(found).all())
    assert float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)) < 0.05
