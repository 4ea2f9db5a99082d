"""The one dtype that a program casts an input to before it reads it."""

import jax
import jax.numpy as jnp
import pytest

from jaxmp._jaxpr.readers import only_dtypes_read
from jaxmp._jaxpr.versions import open_jaxpr

HALF = jnp.bfloat16


def cast(w):
    return jnp.sum(w.astype(HALF))


def in_scan(w):
    return jax.lax.scan(lambda c, _: (c + cast(w), None), HALF(0), length=2)[0]


def sliced_by_scan(w):
    return jax.lax.scan(lambda c, row: (c + cast(row), None), HALF(0), w)[0]


def in_cond(w):
    return jax.lax.cond(True, cast, lambda w: 2 * cast(w), w)


def looked_up(w):
    return jnp.sum(jnp.take(w, jnp.arange(2), axis=0).astype(HALF))


def carried(w):
    return jax.lax.fori_loop(0, 2, lambda _, w: w + 1, w).astype(HALF)


FOUND = {
    "a cast": (cast, HALF),
    "a cast of what was moved": (lambda w: cast(w.T.reshape(-1)[:3]), HALF),
    "two casts": (lambda w: cast(w) + cast(2 * w.astype(HALF)), HALF),
    "jit": (lambda w: jax.jit(cast)(w), HALF),
    "moved by jit, cast outside": (looked_up, HALF),
    "checkpoint": (jax.grad(lambda w: jax.checkpoint(cast)(w) ** 2), HALF),
    "scan": (in_scan, HALF),
    "slices of a scan": (sliced_by_scan, HALF),
    "branches": (in_cond, HALF),
    "two dtypes": (lambda w: cast(w) + jnp.sum(w.astype(jnp.float16)), None),
    "read as it is": (lambda w: cast(w) + jnp.sum(w), None),
    "returned": (lambda w: (cast(w), w.T), None),
    "a carry": (carried, None),
    "not read": (lambda w: jnp.ones(()), None),
}


@pytest.mark.parametrize("case", FOUND)
def test_only_dtypes_read(case):
    fun, expected = FOUND[case]
    jaxpr = jax.make_jaxpr(fun)(jnp.ones((4, 4)))
    assert only_dtypes_read(jaxpr, open_jaxpr(jaxpr).invars[:1]) == [expected]
