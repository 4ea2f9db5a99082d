"""A batched quantised matmul is as many matmuls, whatever is batched, and where."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.quantization.matmul import multiply
from jaxmp.quantization.recipe import ACTIVATION, WEIGHT, recipe_of
from tests.support.quantized import Product, assert_is_rounded, quantized

SIZES = {"b": 3, "m": 6, "n": 5, "k": 8, "h": 2}
COUNT = 4
PRODUCTS = [
    Product("mk", "kn", "mn"),
    Product("mhk", "khn", "mn"),
    Product("mbk", "knb", "bmn"),
    Product("k", "kn", "n"),
]
names = pytest.mark.parametrize("name", ["fp8:hybrid", "int8"])
# Of the axis that is added: in front, in the middle, at the end; None is not batched.
AXES = [(0, None), (None, 0), (0, 0), (1, None), (None, -1), (-1, 1)]
CASES = [(PRODUCTS[0], axes) for axes in AXES]
CASES += [(product, axes) for product in PRODUCTS[1:] for axes in AXES[4:]]


def array(letters, seed, batch=None):
    shape = [SIZES[c] for c in letters]
    if batch is not None:
        shape.insert(batch % (len(shape) + 1), COUNT)
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x * 2.0 ** (np.arange(x.size) % 5).reshape(shape), jnp.bfloat16)


def function_of(product, name):
    def fn(lhs, rhs):
        roles = ACTIVATION, WEIGHT
        numbers = product.dimension_numbers
        return multiply(lhs, rhs, numbers, recipe_of(name), roles)

    return fn


def gradients_of(fn, product):
    def loss(lhs, rhs):
        cotangent = array(product.out, 7).astype(jnp.float32)
        return jnp.sum(fn(lhs, rhs).astype(jnp.float32) * cotangent)

    return jax.grad(loss, (0, 1))


def one_by_one(fn, arrays, axes):
    """The results of a function for each member of a batch, stacked."""
    results = []
    for i in range(COUNT):
        args = [
            x if axis is None else jnp.take(x, i, axis)
            for x, axis in zip(arrays, axes, strict=True)
        ]
        results.append(fn(*args))
    return jax.tree.map(lambda *xs: jnp.stack(xs), *results)


def assert_same_bits(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(np.asarray(x), np.asarray(y))


@names
@pytest.mark.parametrize(("product", "axes"), CASES, ids=str)
def test_vmap_of_values_and_gradients_is_one_matmul_per_member(product, axes, name):
    arrays = [array(c, i, axes[i]) for i, c in enumerate(product[:2])]
    fn = function_of(product, name)

    def both(lhs, rhs):
        return fn(lhs, rhs), gradients_of(fn, product)(lhs, rhs)

    found = jax.jit(jax.vmap(both, in_axes=axes))(*arrays)
    assert_same_bits(found, one_by_one(jax.jit(both), arrays, axes))


@pytest.mark.cpu
@names
@pytest.mark.parametrize("batched", [0, 1])
def test_what_a_whole_batch_shares_gets_its_gradient_in_one_matmul(name, batched):
    """It is added up over the batch, so that scales are shared over it too."""
    product = Product(*(("bmk", "kn", "bmn"), ("mk", "bkn", "bmn"))[batched])
    arrays = [array(letters, i) for i, letters in enumerate(product)]
    fn, axes = function_of(PRODUCTS[0], name), (None, 0) if batched else (0, None)

    def gradients(lhs, rhs, cotangent):
        _, pull_back = jax.vjp(jax.vmap(fn, in_axes=axes), lhs, rhs)
        return pull_back(cotangent)

    found = jax.jit(gradients)(*arrays)
    recipe = recipe_of(name)
    if not recipe.per_row:
        # The backward pass gets what the forward one multiplied.
        values, inverse = quantized(arrays[batched], recipe.operand, (1, 2))
        arrays[batched] = values.astype(np.float64) * inverse
    _, *expected = product.and_gradients(*arrays, name)
    assert_is_rounded(found[1 - batched], expected[1 - batched])


@names
def test_what_is_batched_with_its_partner_gets_a_gradient_per_member(name):
    product = PRODUCTS[0]
    arrays = [array(letters, i, batch=0) for i, letters in enumerate(product)]

    def gradients(fn):
        return jax.jit(lambda x, w, cotangent: jax.vjp(fn, x, w)[1](cotangent))

    fn = function_of(product, name)
    expected = one_by_one(gradients(fn), arrays, (0, 0, 0))
    assert_same_bits(gradients(jax.vmap(fn))(*arrays), expected)


@names
@pytest.mark.parametrize(("outer", "inner"), [*itertools.permutations(AXES[:3], 2)])
def test_batches_are_nested(name, outer, inner):
    product = PRODUCTS[0]
    fn = function_of(product, name)

    def values_and_gradients(lhs, rhs):
        return fn(lhs, rhs), gradients_of(fn, product)(lhs, rhs)

    inner_fn = jax.vmap(values_and_gradients, in_axes=inner)
    shapes = [SIZES["m"], SIZES["k"]], [SIZES["k"], SIZES["n"]]
    arrays = []
    for i, shape in enumerate(shapes):
        counts = [COUNT] * ((inner[i] is not None) + (outer[i] is not None))
        x = np.random.default_rng(i).standard_normal([*counts, *shape])
        arrays.append(jnp.asarray(x, jnp.bfloat16))
    found = jax.jit(jax.vmap(inner_fn, in_axes=outer))(*arrays)
    assert_same_bits(found, one_by_one(jax.jit(inner_fn), arrays, outer))


@names
def test_a_member_that_is_not_finite_spoils_no_other(name):
    fn = function_of(PRODUCTS[0], name)
    x, w = array("mk", 0, batch=0), array("kn", 1)
    clean = jax.vmap(fn, in_axes=(0, None))(x, w)
    spoilt = jax.vmap(fn, in_axes=(0, None))(x.at[2, 1, 3].set(jnp.nan), w)
    assert not np.any(np.isfinite(np.asarray(spoilt[2, 1], np.float32)))
    for i in (0, 1, 3):
        assert_same_bits(spoilt[i], clean[i])
