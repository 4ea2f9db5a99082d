"""The quantised matmul and its two gradients are exact products of rounded operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.policy.quantize import RECIPES
from jaxmp.quantization.matmul import multiply
from jaxmp.quantization.recipe import ACTIVATION, WEIGHT, recipe_of
from tests.support.equations import equations
from tests.support.quantized import (
    Product,
    assert_is_rounded,
    is_quantized_matmul,
    small_operands,
)

SIZES = {"b": 3, "m": 6, "n": 5, "k": 8, "h": 2, "d": 4}
PRODUCTS = [
    Product("mk", "kn", "mn"),
    Product("mk", "nk", "mn"),
    Product("km", "kn", "mn"),
    Product("mk", "k", "m"),
    Product("k", "k", ""),
    Product("m", "n", "mn"),
    # weights as in attention: several axes kept, or several contracted
    Product("bmk", "khd", "bmhd"),
    Product("bmhd", "dhn", "bmn"),
    Product("hbdm", "ndh", "bmn"),
    # batches, wherever their axes stand
    Product("bmk", "bkn", "bmn"),
    Product("mbk", "knb", "bmn"),
    Product("bmhk", "hbkn", "bhmn"),
]
MK_KN = PRODUCTS[0]
recipes = pytest.mark.parametrize("name", RECIPES)

WEIGHT_ON_THE_RIGHT = (ACTIVATION, WEIGHT)


def array(letters, seed, dtype=jnp.bfloat16):
    """Rows of different magnitudes, with an outlier or two."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal([SIZES[c] for c in letters])
    x = x * 2.0 ** rng.integers(-6, 7, x.shape[:1] + (1,) * (x.ndim - 1))
    x *= np.where(rng.random(x.shape) < 0.05, 100.0, 1.0)
    return jnp.asarray(x, dtype)


def operands(product, dtype=jnp.bfloat16, seed=0):
    return [array(letters, seed + i, dtype) for i, letters in enumerate(product)]


def function_of(product, name, roles=WEIGHT_ON_THE_RIGHT, **options):
    def fn(lhs, rhs):
        numbers = product.dimension_numbers
        return multiply(lhs, rhs, numbers, recipe_of(name), roles, **options)

    return fn


def with_gradients(fn):
    def run(lhs, rhs, cotangent):
        out, pull_back = jax.vjp(fn, lhs, rhs)
        return [out, *pull_back(cotangent.astype(out.dtype))]

    return run


# Exactness


DIFFERENT = ("fp8:hybrid", "fp8:rowwise", "int8:wgrad_half")
CASES = [(MK_KN, name) for name in RECIPES]
CASES += [(product, name) for product in PRODUCTS[1:] for name in DIFFERENT]


@pytest.mark.cpu
@pytest.mark.parametrize(("product", "name"), CASES, ids=str)
def test_it_multiplies_the_rounded_operands_exactly_and_so_do_its_gradients(
    product, name
):
    lhs, rhs, cotangent = operands(product)
    expected = product.and_gradients(lhs, rhs, cotangent, name)
    run = jax.jit(with_gradients(function_of(product, name)))
    for actual, exact in zip(run(lhs, rhs, cotangent), expected, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_is_rounded(actual, exact)


@pytest.mark.cpu
@pytest.mark.parametrize("product", PRODUCTS[::3], ids=str)
@pytest.mark.parametrize("name", ["fp8:hybrid", "int8:wgrad_half"])
def test_a_weight_may_stand_on_the_left(product, name):
    """It is the same matmul, its operands swapped."""
    weight, x, cotangent = operands(product)
    fn = function_of(product, name, (WEIGHT, ACTIVATION))
    found = jax.jit(with_gradients(fn))(weight, x, cotangent)
    free = [[c for c in side if c not in product.batch] for side in product[:2]]
    left, right = ("".join(c for c in side if c in product.out) for side in free)
    swapped = Product(product.rhs, product.lhs, product.batch + right + left)
    order = [product.out.index(c) for c in swapped.out]
    moved = np.asarray(cotangent).transpose(order)
    out, to_x, to_weight = swapped.and_gradients(x, weight, moved, name)
    back = np.argsort(order)
    assert_is_rounded(found[0], tuple(part.transpose(back) for part in out))
    assert_is_rounded(found[1], to_weight)
    assert_is_rounded(found[2], to_x)


@pytest.mark.cpu
@recipes
def test_float16_operands_are_added_up_and_scaled_in_float32(name):
    """Small numbers fill their format, and a sum of such products overflows float16."""
    x, w = jnp.full((16, 64), 1e-3, jnp.float16), jnp.full((64, 16), 2e-3, jnp.float16)
    cotangent = jnp.full((16, 16), 1e-2, jnp.float16)
    assert float(jnp.finfo(jnp.float16).max) < 0.9 * 240 * 240 * 64
    found = jax.jit(with_gradients(function_of(MK_KN, name)))(x, w, cotangent)
    expected = MK_KN.and_gradients(x, w, cotangent, name)
    for actual, exact in zip(found, expected, strict=True):
        assert actual.dtype == jnp.float16
        assert_is_rounded(actual, exact)
        assert np.all(np.asarray(actual) > 0)


@pytest.mark.parametrize("name", DIFFERENT)
def test_eager_jitted_and_batched_results_are_the_same_bits(name):
    run, arrays = with_gradients(function_of(MK_KN, name)), operands(MK_KN)
    eager, jitted = run(*arrays), jax.jit(run)(*arrays)
    stacked = [jnp.stack([x * 0, x]) for x in arrays]
    batched = [x[1] for x in jax.jit(jax.vmap(run))(*stacked)]
    for other in (jitted, batched):
        for x, y in zip(eager, other, strict=True):
            assert x.dtype == y.dtype == jnp.bfloat16
            assert np.array_equal(np.asarray(x), np.asarray(y))


# Where gradients go


class Stored:
    """A float32 weight, its copy in half transposed on the way to its matmul."""

    def __init__(self, value):
        self.value = value

    def move(self, x):
        return x.T


@pytest.mark.cpu
@recipes
def test_a_stored_weight_gets_its_gradient_in_its_own_dtype_and_place(name):
    x, w, cotangent = operands(MK_KN)
    stored = w.T.astype(jnp.float32)

    def fn(x, stored):
        half = stored.T.astype(jnp.bfloat16)
        weights = {1: Stored(stored)}
        return function_of(MK_KN, name, stored=weights)(x, half)

    _, to_x, to_w = jax.jit(with_gradients(fn))(x, stored, cotangent)
    _, expected_x, expected_w = MK_KN.and_gradients(x, w, cotangent, name)
    assert to_x.dtype == jnp.bfloat16
    assert_is_rounded(to_x, expected_x)
    assert to_w.dtype == jnp.float32
    # Within the error of float32: it was never rounded to bfloat16.
    assert_is_rounded(to_w, tuple(part.T for part in expected_w))
    assert np.any(to_w != to_w.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.cpu
def test_a_result_may_leave_in_float32():
    lhs, rhs, cotangent = operands(MK_KN)
    for name in RECIPES:
        fn = function_of(MK_KN, name, dtype=jnp.dtype(jnp.float32))
        out = jax.jit(fn)(lhs, rhs)
        assert out.dtype == jnp.float32
        assert_is_rounded(out, MK_KN.and_gradients(lhs, rhs, cotangent, name)[0])


# Formats


@recipes
def test_every_small_matmul_has_an_operand_in_e4m3_or_is_int8(name):
    arrays = operands(MK_KN)
    eqns = equations(with_gradients(function_of(MK_KN, name)), *arrays)
    matmuls = [eqn for eqn in eqns if is_quantized_matmul(eqn)]
    assert len(matmuls) == (2 if "half" in name else 3)
    half = [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]
    assert len(half) == 3 - len(matmuls)
    for eqn in matmuls:
        formats = [dtype.name for dtype in small_operands(eqn)]
        assert len(formats) == 2
        if name.startswith("int8"):
            assert formats == ["int8", "int8"]
        else:
            assert "float8_e4m3fn" in formats


def test_a_gradient_that_nobody_asks_for_costs_no_matmul():
    x, w, _ = operands(MK_KN)
    fn = function_of(MK_KN, "fp8")

    def gradient(x, w):
        return jax.grad(lambda x: fn(x, w).astype(jnp.float32).sum())(x)

    eqns = equations(gradient, x, w)
    assert len([*filter(is_quantized_matmul, eqns)]) == 2
