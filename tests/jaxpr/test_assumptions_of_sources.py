"""What jaxmp takes for granted of JAX's name stacks and tracebacks, one by one."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.scipy import special, stats

from jaxmp._jaxpr import calls, jax_functions, tracers
from jaxmp._jaxpr.primitives import CAST
from jaxmp._jaxpr.scopes import count_derivatives, is_backward, name_scopes
from jaxmp._jaxpr.sources import written
from jaxmp._jaxpr.walk import walk
from tests.support.equations import equation, equations

X = jnp.ones((4, 3))
HALF, SINGLE = jnp.ones((4, 4), jnp.bfloat16), jnp.ones((4, 4))


# Name stacks (scopes, site)


def test_a_name_stack_holds_scopes_and_transformations_by_name():
    @jax.grad
    def fn(x):
        with jax.named_scope("outer"):
            return jnp.sum(jnp.sin(x))

    cosine = equation("cos", fn, X)
    parts = cosine.source_info.name_stack.stack
    assert [(type(p).__name__, p.name) for p in parts] == [
        ("Transform", "jvp"),
        ("Scope", "outer"),
    ]
    assert name_scopes(cosine) == ("outer",)
    assert count_derivatives(cosine) == 1
    backward = equation("mul", fn, X)
    assert is_backward(backward), backward.source_info.name_stack
    assert tracers.is_transposed(backward)
    assert not is_backward(cosine)


def test_a_checkpoint_names_what_it_computes_again():
    fn = jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x).sum())
    region = equation(calls.CHECKPOINTS, fn, X)
    names = {name for e in walk(calls.body(region)) for name in name_scopes(e)}
    assert names == {"rematted_computation"}


# Tracebacks (sources, jax_functions)


def test_a_traceback_has_frames_with_a_file_a_line_and_a_qualified_name():
    def fn(x):
        return jnp.sin(x)

    traceback = equation("sin", fn, X).source_info.traceback
    found = [
        frame.line_num
        for frame in traceback.frames
        if frame.file_name == __file__ and frame.function_name.endswith("<locals>.fn")
    ]
    assert found == [inspect.getsourcelines(fn)[1] + 1]
    assert written(traceback).source.line == found[0]


def test_the_files_of_jax_stand_in_one_folder():
    traceback = equation("sin", jnp.sin, X).source_info.traceback
    innermost = traceback.frames[0].file_name.replace("\\", "/")
    assert jax_functions._SOURCES in innermost
    assert innermost.startswith(jax.__file__.replace("\\", "/").rpartition("/")[0])


def cast_in(fn):
    return equation(CAST, fn, HALF, SINGLE)


CASTS = {
    "method astype": lambda x, _: x.astype(jnp.float32),
    "jnp.astype": lambda x, _: jnp.astype(x, jnp.float32),
    "jnp.array": lambda x, _: jnp.array(x, jnp.float32),
    "jnp.asarray": lambda x, _: jnp.asarray(x, jnp.float32),
    "jnp.float32": lambda x, _: jnp.float32(x),
    "lax": lambda x, _: lax.convert_element_type(x, jnp.float32),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_is_made_by_one_of_these_functions(name):
    eqn = cast_in(CASTS[name])
    how = written(eqn.source_info.traceback)
    assert jax_functions.asks_for_cast(how), how.inside_jax
    assert not jax_functions.is_promotion(eqn)


PROMOTIONS = {
    "operator": lambda x, y: x * y,
    "operator of an inlined function": lambda x, y: x / y,
    "ufunc": jnp.add,
    "power": jnp.power,
    "where": lambda x, y: jnp.where(y > 0, x, y),
    "concatenate": lambda x, y: jnp.concatenate([x, y]),
    "hypot": jnp.hypot,
}


@pytest.mark.parametrize("name", PROMOTIONS)
def test_a_promotion_is_made_by_one_of_these_functions(name):
    eqn = cast_in(PROMOTIONS[name])
    how = written(eqn.source_info.traceback)
    assert jax_functions.is_promotion(eqn), how.inside_jax


SPECIAL = {special.erfcx: True, stats.norm.logpdf: True, jax.scipy.linalg.expm: False}


@pytest.mark.parametrize("fn", SPECIAL, ids=lambda fn: fn.__name__)
def test_special_functions_stand_in_files_of_their_own(fn):
    *_, last = equations(fn, SINGLE)
    found = jax_functions.is_in_special_function(last)
    frames = last.source_info.traceback.frames
    assert found == SPECIAL[fn], [frame.file_name for frame in frames]
