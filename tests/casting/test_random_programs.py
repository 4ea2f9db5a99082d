"""Random programs, nested and differentiated: autocast only changes precision.

And costs no more of it than writing the same program in half by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxmp
from tests.support.programs.random_programs import (
    HALF,
    PROGRAMS,
    arguments,
    examples,
    gradient,
    loss_of,
)

POLICIES = pytest.mark.parametrize("policy", HALF)


@functools.cache
def fast_compile():
    """Options for XLA, since compiling is most of the time.

    Newer releases do not have the last, which saves more than the others.
    """
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    older = {**options, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=older)()
    except jax.errors.JaxRuntimeError:
        return options
    return older


def gradients(*losses):
    """Losses, outputs and gradients of each, in one program to compile."""
    all_of_them = [gradient(loss) for loss in losses]
    return jax.jit(
        lambda *args: [fn(*args) for fn in all_of_them],
        compiler_options=fast_compile(),
    )


def distances(actual, expected, floor):
    """How far arrays are from others, in units of the size of these."""
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        size = np.linalg.norm(e) + floor * a.size**0.5
        yield np.linalg.norm(a - e) / size


def avals(found):
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(found)]


def errors(found, exact):
    """Of the values and gradients of a program, one number each."""
    (_, values), grads = found
    (_, exact_values), exact_grads = exact
    assert all(np.isfinite(x).all() for x in (*values, *grads))
    return [
        *distances(values, exact_values, 0.1),
        *distances(grads, exact_grads, 0.01),
    ]


def check_precision(program, policy, half_residuals):
    """The error is no more than three times that of the program in half by hand.

    On the average of three inputs: of one, what is by hand may be right by chance.
    """
    steps, n = program
    half = HALF[policy]
    cast = jaxmp.autocast(loss_of(steps), policy, half_residuals=half_residuals)
    run = gradients(loss_of(steps), loss_of(steps, half), cast)
    plain, _, found = run.eval_shape(*arguments(n))
    assert avals(found) == avals(plain)
    actual, by_hand = [], []
    for seed in (7, 8, 9):
        exact, hand, found = run(*arguments(n, seed))
        actual.append(errors(found, exact))
        by_hand.append(errors(hand, exact))
    allowed = 3 * np.mean(by_hand, 0) + float(jnp.finfo(half).eps)
    assert (np.mean(actual, 0) <= allowed).all(), (actual, by_hand)


@examples(6, program=PROGRAMS)
def test_float32_is_the_same_program(program):
    steps, n = program
    fns = [
        jax.jit(gradient(loss))
        for loss in (loss_of(steps), jaxmp.autocast(loss_of(steps), "float32"))
    ]
    for precision in (None, "highest"):
        with jax.default_matmul_precision(precision):
            texts = [str(fn.trace(*arguments(n)).jaxpr) for fn in fns]
        assert texts[0] == texts[1]


@examples(1, program=PROGRAMS)
def test_float32_changes_no_bit(program):
    steps, n = program
    cast = jaxmp.autocast(loss_of(steps), "float32")
    expected, actual = gradients(loss_of(steps), cast)(*arguments(n))
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_array_equal(a, e)


@POLICIES
@examples(6, program=PROGRAMS, half_residuals=st.booleans())
def test_the_error_is_that_of_half_by_hand(policy, program, half_residuals):
    check_precision(program, policy, half_residuals)


@pytest.mark.slow
@POLICIES
@examples(12, program=PROGRAMS, half_residuals=st.booleans())
def test_the_error_is_that_of_half_by_hand_in_many_programs(
    policy, program, half_residuals
):
    check_precision(program, policy, half_residuals)
