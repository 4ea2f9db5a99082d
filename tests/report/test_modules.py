"""What is compiled elsewhere is what `jax.jit` compiles here, to the byte."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp._jaxpr.lowered import kept_arguments
from jaxmp.errors import UnsupportedJaxVersion
from jaxmp.report import compile_step

from .programs import CASES, array

TABLE = np.arange(2000, dtype=np.float32).reshape(40, 50)


def loss(w, x):
    return jnp.sum(jax.nn.gelu(x @ w, approximate=False))


def with_key(w, key):
    noise = jax.random.normal(key, w.shape)
    return w + noise, jax.random.split(key)


def printing(x):
    jax.debug.print("{}", x.sum())
    return x * 2


KEY = jax.eval_shape(lambda: jax.random.key(0))
STEPS = {
    **{name: (case.step, case.args) for name, case in CASES.items()},
    "gradient": (jax.value_and_grad(loss), (array(40, 50), array(8, 40))),
    "autocast": (jaxmp.autocast(jax.grad(loss)), (array(40, 50), array(8, 40))),
    "keys": (with_key, (array(40, 50), KEY)),
    "a key that is split": (lambda key: jax.random.split(key, 3), (KEY,)),
    "an argument that is not used": (lambda x, y: x + 1, (array(40, 50), array(9))),
    "jitted, an argument not used": (
        jax.jit(lambda x, y: x + 1),
        (array(40, 50), array(9)),
    ),
    "nothing used": (lambda x: jnp.zeros(3), (array(40, 50),)),
    "no argument": (lambda: jnp.zeros(3), ()),
    "a constant": (lambda x: x @ TABLE, (array(8, 40),)),
    "a number": (lambda x, n: x * n, (array(8, 40), 3.0)),
    "static": (
        functools.partial(jax.jit(lambda x, n: x[:n], static_argnums=1), n=3),
        (array(8, 40),),
    ),
    "dtypes": (
        lambda a, b, c: (a.astype(jnp.float32), b.astype(jnp.int8), ~c),
        (
            jax.ShapeDtypeStruct((64,), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((64,), jnp.uint16),
            jax.ShapeDtypeStruct((64,), jnp.bool_),
        ),
    ),
    "a custom call": (jnp.linalg.cholesky, (array(40, 40),)),
    "branches": (
        lambda p, x: jax.lax.cond(p, jnp.sin, jnp.cos, x),
        (jax.ShapeDtypeStruct((), jnp.bool_), array(40)),
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_sizes_are_those_of_jit(name):
    step, args = STEPS[name]
    told = compile_step(
        step, *args, policies=["float32"], targets=["cpu"], cache=False
    ).rows[0]
    with jax.default_device(jax.devices("cpu")[0]):
        stats = jax.jit(step).lower(*args).compile().memory_analysis()
    assert (told.arguments, told.temp, told.output) == (
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes,
    )


def test_donated_arguments_are_named_after_unused_ones_are_left_out():
    def step(unused, params, x):
        return params - x.sum(), unused.shape[0]

    args = (array(7), array(512, 512), array(9))
    row = compile_step(
        step,
        *args,
        policies=["float32"],
        targets=["cpu"],
        donate_argnums=(1,),
        cache=False,
    ).rows[0]
    assert row.arguments == 4 * (512 * 512 + 9)
    assert row.peak < 1.5 * row.arguments
    assert "params" in {buffer.name for buffer in row.buffers}


def test_a_jax_that_keeps_programs_otherwise_is_refused():
    with pytest.raises(UnsupportedJaxVersion, match="lowered programs"):
        kept_arguments(object())


def test_a_step_that_prints_is_compiled():
    row = compile_step(
        printing, array(8), policies=["float32"], targets=["cpu"], cache=False
    ).rows[0]
    assert (row.arguments, row.output) == (4 * 8, 4 * 8)
