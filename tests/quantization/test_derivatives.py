"""Forward-mode derivatives are those of a matmul in half; no second ones exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import NoSecondDerivative
from jaxmp.policy.quantize import RECIPES
from jaxmp.quantization.matmul import multiply
from jaxmp.quantization.recipe import ACTIVATION, WEIGHT, recipe_of
from jaxmp.quantization.scales import quantize
from tests.support.equations import equations
from tests.support.quantized import is_quantized_matmul

recipes = pytest.mark.parametrize("name", RECIPES)
NUMBERS = (((1,), (0,)), ((), ()))
KEYS = jax.random.split(jax.random.key(0), 4)
X, DX = (jax.random.normal(key, (6, 16), jnp.bfloat16) for key in KEYS[:2])
W, DW = (jax.random.normal(key, (16, 5), jnp.bfloat16) for key in KEYS[2:])


def function_of(name):
    return lambda x, w: multiply(x, w, NUMBERS, recipe_of(name), (ACTIVATION, WEIGHT))


def in_half(x, w):
    return jax.lax.dot_general(x, w, NUMBERS, preferred_element_type=jnp.bfloat16)


def as_kept(x, name):
    """What a tangent is multiplied by: the rounded operand where one scale serves."""
    recipe = recipe_of(name)
    return x if recipe.per_row else quantize(x, recipe.operand, None).in_dtype(x.dtype)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert np.array_equal(np.asarray(found), np.asarray(expected))


# Forward


@recipes
def test_a_tangent_is_that_of_a_matmul_in_half(name):
    fn = function_of(name)
    x, w = as_kept(X, name), as_kept(W, name)
    for tangents, expected in (
        ((DX, DW * 0), in_half(DX, w)),
        ((DX * 0, DW), in_half(x, DW)),
        ((DX, DW), in_half(DX, w) + in_half(x, DW)),
    ):
        out, tangent = jax.jvp(fn, (X, W), tangents)
        assert_same_bits(out, fn(X, W))
        assert_same_bits(tangent, expected)


@recipes
def test_a_tangent_is_within_the_rounding_of_the_format(name):
    _, tangent = jax.jvp(function_of(name), (X, W), (DX, DW))
    _, exact = jax.jvp(in_half, (X, W), (DX, DW))
    error = np.linalg.norm(np.asarray(tangent - exact, np.float32))
    assert error < 0.05 * np.linalg.norm(np.asarray(exact, np.float32))


@recipes
def test_what_is_linearised_is_the_tangent(name):
    fn = function_of(name)
    out, linear = jax.linearize(fn, X, W)
    assert_same_bits(out, fn(X, W))
    assert_same_bits(linear(DX, DW), jax.jvp(fn, (X, W), (DX, DW))[1])
    assert_same_bits(linear(DX * 4, DW * 4), 4 * linear(DX, DW))


@recipes
def test_a_forward_jacobian_has_a_tangent_for_each_number(name):
    row, w = X[:1, :4], W[:4]
    fn = function_of(name)
    jacobian = jax.jacfwd(fn)(row, w)
    assert jacobian.shape == (1, 5, 1, 4)
    for i in range(4):
        tangent = jnp.zeros_like(row).at[0, i].set(1)
        _, column = jax.jvp(lambda row: fn(row, w), (row,), (tangent,))
        assert_same_bits(jacobian[..., 0, i], column)


@recipes
def test_a_reverse_jacobian_has_a_gradient_for_each_result(name):
    row, w = X[:1, :4], W[:4]
    fn = function_of(name)
    jacobian = jax.jacrev(fn, 1)(row, w)
    _, pull_back = jax.vjp(lambda w: fn(row, w), w)
    for i in range(5):
        cotangent = jnp.zeros((1, 5), jnp.bfloat16).at[0, i].set(1)
        (gradient,) = pull_back(cotangent)
        assert_same_bits(jacobian[0, i], gradient)


def test_a_tangent_is_multiplied_in_half():
    eqns = equations(lambda: jax.jvp(function_of("fp8"), (X, W), (DX, DW)))
    assert len([*filter(is_quantized_matmul, eqns)]) == 1


# Twice


def loss(x, w):
    return jnp.sum(jnp.tanh(function_of("fp8")(x, w).astype(jnp.float32)))


def int8_loss(x, w):
    return jnp.sum(jnp.tanh(function_of("int8")(x, w).astype(jnp.float32)))


ONCE = {"forward": jax.jacfwd, "backward": jax.jacrev, "grad": jax.grad}
TWICE = {
    f"{second} of {first}": lambda fn, a=a, b=b: b(lambda x, w: a(fn)(x, w).sum())
    for first, a in ONCE.items()
    for second, b in ONCE.items()
}


@pytest.mark.parametrize("order", TWICE)
@pytest.mark.parametrize(("fn", "format"), [(loss, "float8"), (int8_loss, "int8")])
def test_a_second_derivative_is_refused_with_the_repair(order, fn, format):
    with pytest.raises(NoSecondDerivative) as caught:
        jax.jit(TWICE[order](fn))(X, W)
    for word in (format, "twice", "'mixed_bfloat16'", "quantize='none'"):
        assert word in str(caught.value)


def test_a_hessian_is_refused_and_one_of_the_rest_is_not():
    with pytest.raises(NoSecondDerivative):
        jax.hessian(loss)(X, W)

    def penalty(x, w):
        """Beside a quantised matmul that is not differentiated."""
        return jnp.sum(x.astype(jnp.float32) ** 4) + loss(jax.lax.stop_gradient(x), w)

    second = jax.grad(lambda x: jax.grad(penalty)(x, W).astype(jnp.float32).sum())(X)
    expected = 12 * np.asarray(X, np.float32) ** 2
    assert np.allclose(np.asarray(second, np.float32), expected, rtol=0.02)
