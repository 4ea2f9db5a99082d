"""The public functions of JAX, crossed with what autocast promises of any function.

Each is called with float32 arrays that bfloat16 and float16 can hold, and stands
between two matmuls by one: autocast hands it half values, and wants a half result of
it, without a rounding of its own.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.testing import matmuls
from tests.support.surface import (
    KINDS,
    ONE,
    between_matmuls,
    kinds,
    public_functions,
    surface,
)
from tests.support.surface_arguments import ARGUMENTS, EXCLUDED

DOC = pathlib.Path(__file__).parents[2] / "docs" / "surface.md"
COMPLETE_FOR = "0.10.2"  # the JAX that the list was written for
FUNCTIONS, UNKNOWN = surface()
EPSILON = {"mixed_bfloat16": 2.0**-8, "mixed_float16": 2.0**-11}
# Values and gradients of these are compiled in every run, of the others in slow runs.
QUICK = ("jax.nn", "jax.image", "jax.numpy.fft", "jax.ops")


def is_quick(case):
    return case.name.startswith(QUICK)


def compiled(case):
    return pytest.param(
        case, id=case.name, marks=() if is_quick(case) else pytest.mark.slow
    )


functions = pytest.mark.parametrize("case", FUNCTIONS, ids=lambda f: f.name)
compiled_functions = pytest.mark.parametrize("case", [compiled(f) for f in FUNCTIONS])
policies = pytest.mark.parametrize("policy", EPSILON)


def avals(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def values_and_gradients(fn, case):
    """A function of `ONE` and the arguments: values, gradients of a weighted sum."""

    def weighted_sum(*args):
        values = fn(*args)
        total = jnp.float32(0)
        for x in jax.tree.leaves(values):
            weights = (1 + jnp.arange(x.size).reshape(x.shape) % 5) / 4
            if jnp.issubdtype(x.dtype, jnp.complexfloating):
                total += jnp.sum(weights * x.real) + jnp.sum(weights * x.imag)
            elif jnp.issubdtype(x.dtype, jnp.floating):
                total += jnp.sum(weights * x)
        return total, values

    if not is_differentiable(case):
        return lambda *args: ((), fn(*args))
    return jax.grad(weighted_sum, range(1, 1 + len(case.args)), has_aux=True)


def is_differentiable(case):
    def total(args):
        leaves = jax.tree.leaves(case.fn(*args))
        return sum(jnp.sum(jnp.abs(x)).astype(float) for x in leaves)

    # Whatever a function raises that has no reverse derivative.
    try:
        jax.eval_shape(jax.grad(total), case.args)
    except Exception:
        return False
    return bool(case.args)


@functools.cache
def in_float32(name):
    case = next(f for f in FUNCTIONS if f.name == name)
    fn = values_and_gradients(between_matmuls(case), case)
    return jax.tree.map(np.asarray, jax.jit(fn)(ONE, *case.args))


def error(actual, expected):
    """The largest difference, relative to the largest element; inf if not finite."""
    if not jnp.issubdtype(expected.dtype, jnp.inexact):
        return 0.0 if np.array_equal(actual, expected) else np.inf
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(actual), finite):
        return np.inf
    scale = np.abs(expected[finite]).max(initial=1e-30)
    return np.abs(actual[finite] - expected[finite]).max(initial=0) / scale


def fits_float16(x):
    """False if the largest element overflows float16, or is subnormal there."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return True
    largest = np.abs(x[np.isfinite(x)]).max(initial=0)
    return largest == 0 or 2.0**-14 <= largest <= 65504


def test_every_public_function_is_called_or_excluded():
    if jax.__version__ == COMPLETE_FOR:
        assert UNKNOWN == []
        assert {*ARGUMENTS, *EXCLUDED} <= {name for name, _ in public_functions()}
    assert len(FUNCTIONS) > 500


@functions
def test_avals_are_those_of_the_function(case):
    expected = jax.eval_shape(case.fn, *case.args)
    for policy in EPSILON:
        cast = jaxmp.autocast(case.fn, policy)
        assert avals(jax.eval_shape(cast, *case.args)) == avals(expected)
        cast = jaxmp.autocast(between_matmuls(case), policy)
        assert avals(jax.eval_shape(cast, ONE, *case.args)) == avals(expected)


@functions
def test_without_a_matmul_nothing_changes(case):
    before = jax.make_jaxpr(case.fn)(*case.args)
    if any(dtype == jnp.float32 for m in matmuls(before) for dtype in m.operands):
        return
    after = jax.make_jaxpr(jaxmp.autocast(case.fn))(*case.args)
    dtypes = {
        v.aval.dtype for _, e in jaxmp.testing.equations(after) for v in e.outvars
    }
    assert not dtypes & {jnp.dtype("bfloat16"), jnp.dtype("float16")}


@policies
@compiled_functions
def test_values_and_gradients_are_those_of_float32(case, policy):
    fn = values_and_gradients(jaxmp.autocast(between_matmuls(case), policy), case)
    actual = jax.jit(fn)(ONE, *case.args)
    expected = in_float32(case.name)
    assert avals(actual) == avals(expected)
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        if policy == "mixed_bfloat16" or fits_float16(e):
            assert error(np.asarray(a), e) < 4 * EPSILON[policy]


# Infinite or NaN in float32, and autocast has to say the same.
OUTSIDE_OF_SUPPORT = {
    "jax.scipy.special.bessel_jn",
    "jax.scipy.stats.dirichlet.logpdf",
    "jax.scipy.stats.pareto.logcdf",
    "jax.scipy.stats.pareto.logpdf",
    "jax.scipy.stats.poisson.logpmf",
}


@compiled_functions
def test_float32_values_are_finite(case):
    values = jax.tree.leaves(in_float32(case.name)[1])
    is_finite = all(np.isfinite(x).any() for x in values if x.dtype == np.float32)
    assert is_finite == (case.name not in OUTSIDE_OF_SUPPORT)


found_kinds = functools.cache(kinds)


def documented_kinds():
    titles = {title: kind for kind, title in KINDS.items()}
    found = {}
    for line in DOC.read_text().splitlines():
        if line.startswith("| `jax"):
            module, title, names = (part.strip() for part in line.split("|")[1:-1])
            for name in names.split(", "):
                found[f"{module}.{name}".replace("`", "")] = titles[title]
    return found


def test_the_document_says_where_each_function_runs():
    documented, found = documented_kinds(), found_kinds()
    if jax.__version__ == COMPLETE_FOR:
        assert documented == found
    # How a function is written changes with JAX, not whether it multiplies in half.
    common = documented.keys() & found.keys()
    assert len(common) > 400
    assert {n for n in common if documented[n] == "matmul"} == {
        n for n in common if found[n] == "matmul"
    }


def test_only_a_covariance_multiplies_in_half_in_special_functions_and_densities():
    modules = ("jax.scipy.special", "jax.scipy.stats")
    in_half = {name for name, kind in found_kinds().items() if kind == "matmul"}
    assert {n for n in in_half if n.startswith(modules)} <= {
        "jax.scipy.stats.gaussian_kde"
    }


def test_constant_results_are_arrays_inside_of_jit():
    def fn(x):
        return x @ x, jnp.asarray(False), jnp.asarray(3)

    def results(x):
        assert all(isinstance(y, jax.Array) for y in jaxmp.autocast(fn)(x))
        return x

    jax.jit(results)(jnp.ones((2, 2)))
