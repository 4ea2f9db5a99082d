"""`jax.default_matmul_precision` is no decision of the program's about one matmul."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmp
from jaxmp._jaxpr.rewrite import map_held
from jaxmp.testing import equations
from tests.support.functions import example_arguments

W, X = example_arguments()
HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
DEFAULT = (lax.Precision.DEFAULT, lax.Precision.DEFAULT)


@contextlib.contextmanager
def by_option(precision):
    config: Any = jax.config
    before = config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", precision)
    try:
        yield
    finally:
        jax.config.update("jax_default_matmul_precision", before)


AMBIENT = [jax.default_matmul_precision, by_option]


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
)


@jax.custom_jvp
def custom_forward(x, w):
    return jnp.tanh(x @ w)


@custom_forward.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = custom_forward(x, w)
    return y, (1 - y * y) * (dx @ w + x @ dw)


def network(w, x):
    def block(x, _):
        return x + jax.checkpoint(lambda x: jnp.tanh(jax.jit(jnp.matmul)(x, w)))(
            x
        ), None

    x = lax.scan(block, x @ w, length=2)[0]
    x = lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x)
    return jnp.sum(custom_forward(custom(x, w), w))


def dots(fn):
    jaxpr = jax.make_jaxpr(fn)(W, X)
    return [e for _, e in equations(jaxpr) if e.primitive.name == "dot_general"]


def dtype_of(dot):
    return dot.invars[0].aval.dtype


@pytest.mark.parametrize("ambient", AMBIENT, ids=["context", "option"])
@pytest.mark.parametrize("precision", ["highest", "F32_F32_F32"])
def test_matmuls_are_in_half_under_an_ambient_precision(ambient, precision):
    found = dots(jax.grad(jaxmp.autocast(network)))
    assert {dtype_of(dot) for dot in found} == {jnp.dtype(jnp.bfloat16)}
    with ambient(precision):
        under = dots(jax.grad(jaxmp.autocast(network)))
        assert jaxmp.explain(network)(W, X).half_flops == 1.0
    assert [dtype_of(dot) for dot in under] == [dtype_of(dot) for dot in found]
    assert {dot.params["precision"] for dot in under} == {DEFAULT}


def kept(w, x):
    """Float32 by a cast, by name, in a call that is bound whole, and next to half."""
    x = x.astype(jnp.bfloat16).astype(jnp.float32) @ w
    x = jaxmp.full_precision(jax.jit(lambda x: jnp.tanh(x @ w)))(x)
    x = lax.custom_linear_solve(
        lambda v: v + 0 * (v @ w), x, lambda mv, b: mv(b), symmetric=True
    )
    return x @ w


@pytest.mark.parametrize("ambient", AMBIENT, ids=["context", "option"])
def test_what_stays_in_float32_keeps_the_ambient_precision(ambient):
    with ambient("highest"):
        found = dots(jaxmp.autocast(kept))
    half = [dtype_of(dot) == jnp.bfloat16 for dot in found]
    assert sum(half) == 1
    precisions = [dot.params["precision"] for dot in found]
    assert all((p == HIGHEST) != h for p, h in zip(precisions, half, strict=True))
    assert {dot.params["precision"] for dot in dots(jaxmp.autocast(kept))} == {None}


def test_a_precision_that_the_program_sets_itself_is_its_own():
    def fn(w, x):
        with jax.default_matmul_precision("highest"):
            x = x @ w
        return x @ w

    with jax.default_matmul_precision("high"):
        first, second = dots(jaxmp.autocast(fn))
    assert first.params["precision"] == HIGHEST
    assert [dtype_of(first), dtype_of(second)] == [jnp.float32, jnp.bfloat16]


def test_the_algorithm_of_the_policy_wins_over_the_ambient_one():
    with jax.default_matmul_precision("highest"):
        (dot,) = dots(jaxmp.autocast(lambda w, x: x @ w, "float32,matmul=tf32"))
    assert dot.params["precision"] == (lax.Precision.HIGH, lax.Precision.HIGH)


def test_an_eager_call_sees_the_precision_that_is_ambient_now():
    cast = jaxmp.autocast(lambda w, x: jaxmp.full_precision(jnp.matmul)(x, w))
    for precision in ("bfloat16", "highest", None):
        with jax.default_matmul_precision(precision):
            np.testing.assert_array_equal(cast(W, X), jax.jit(jnp.matmul)(X, W))


def test_parameters_without_a_jaxpr_to_change_stay_the_same_object():
    (scan,) = jax.make_jaxpr(lambda x: lax.scan(lambda c, _: (c, c), x, None, 2))(
        1.0
    ).eqns
    assert map_held(scan.params, lambda jaxpr: jaxpr) is scan.params
