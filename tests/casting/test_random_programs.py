"""Random programs, nested and differentiated: autocast only changes precision."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxmp
from jaxmp.testing._programs import BLOCKS, MATMULS, OPERATIONS, run_program

# Compiling is most of the time.
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
FLOAT32 = jnp.dtype("float32")


def steps_of(blocks, min_size, max_size):
    # An index counts from the end, where a program goes on.
    index = st.sampled_from([-1, -1, -1, -2, 0])
    operation = st.tuples(st.sampled_from(sorted(OPERATIONS)), index, index)
    matmul = st.tuples(st.sampled_from([*MATMULS, *["matmul"] * 4]), index)
    step = st.one_of(operation, matmul, *blocks)
    return st.lists(step, min_size=min_size, max_size=max_size)


def nested(inner):
    index = st.sampled_from([-1, -1, -2])
    return st.tuples(st.sampled_from(sorted(BLOCKS)), index, inner)


INNER = steps_of([nested(steps_of([], 1, 2))], 1, 3)
PROGRAMS = st.tuples(steps_of([nested(INNER)] * 2, 3, 6), st.integers(0, 2))


def value_and_grad(steps, transform):
    """Outputs, a loss and its gradients, of the program under a transformation."""

    @transform
    def loss(w, x, n):
        pool = run_program(steps, w, x, n)
        outputs = [pool[-1], *pool[len(pool) // 2 : -1 : 2]]
        return sum(jnp.mean(jnp.sin(y)) for y in outputs), outputs

    grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
    return jax.jit(grad, compiler_options=FAST_COMPILE)


def arguments(n):
    keys = jax.random.split(jax.random.key(7))
    w = jax.random.normal(keys[0], (8, 8)) / 8**0.5
    return w, jax.random.normal(keys[1], (4, 8)), n


def worst(actual, expected, floor):
    """The largest distance between two lists of arrays, in units of their size."""
    errors = [0.0]
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        errors.append(np.linalg.norm(a - e) / (np.linalg.norm(e) + floor * a.size**0.5))
    return max(errors)


def check(program, policy, tolerance, half_residuals=True):
    steps, n = program
    cast = functools.partial(
        jaxmp.autocast, policy=policy, half_residuals=half_residuals
    )
    plain, cast = (value_and_grad(steps, f) for f in (lambda fn: fn, cast))
    args = arguments(n)
    (_, expected), expected_grads = plain(*args)
    (_, outputs), grads = cast(*args)
    assert avals(cast, args) == avals(plain, args)
    assert {g.dtype for g in grads} == {FLOAT32}
    assert all(np.isfinite(g).all() for g in grads)
    assert worst(outputs, expected, 0.1) < tolerance
    assert worst(grads, expected_grads, 0.01) < 5 * tolerance


def avals(fn, args):
    out = jax.tree.leaves(fn.eval_shape(*args))
    return [(x.shape, x.dtype, x.weak_type) for x in out]


def examples(number):
    settings = hypothesis.settings(
        max_examples=number,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda test: settings(hypothesis.given(PROGRAMS)(test))


@examples(40)
def test_bfloat16_changes_precision_only(program):
    check(program, "mixed_bfloat16", 0.03)


@examples(20)
def test_float16_changes_precision_only(program):
    """With eight times the precision of bfloat16, and no more than its tolerance."""
    check(program, "mixed_float16", 0.03 / 8)


@examples(12)
def test_float32_is_the_same_program(program):
    steps, n = program
    plain, cast = (
        value_and_grad(steps, transform)
        for transform in (lambda fn: fn, lambda fn: jaxmp.autocast(fn, "float32"))
    )
    for precision in (None, "highest"):
        with jax.default_matmul_precision(precision):
            texts = [str(fn.trace(*arguments(n)).jaxpr) for fn in (plain, cast)]
        assert texts[0] == texts[1]


@examples(2)
def test_float32_changes_no_bit(program):
    steps, n = program
    args = arguments(n)
    expected = value_and_grad(steps, lambda fn: fn)(*args)
    actual = value_and_grad(steps, lambda fn: jaxmp.autocast(fn, "float32"))(*args)
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.slow
@pytest.mark.parametrize("half_residuals", [True, False])
@examples(150)
def test_bfloat16_changes_precision_only_in_many_programs(half_residuals, program):
    check(program, "mixed_bfloat16", 0.03, half_residuals)


@pytest.mark.slow
@examples(150)
def test_float16_changes_precision_only_in_many_programs(program):
    check(program, "mixed_float16", 0.03 / 8)
