"""The assertions of `jaxmp.testing` hold where they should and name what is wrong."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp import errors
from jaxmp.testing import (
    assert_matmuls_in,
    assert_max_traces,
    assert_no_upcast,
    assert_precision_close,
)

X = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
W = jax.ShapeDtypeStruct((16, 16), jnp.bfloat16)
F32 = jax.ShapeDtypeStruct((16, 16), jnp.float32)


def healthy(x, w):
    return x * 0.5 @ w


def leaky(x, w):
    return x * np.float32(0.5) @ w


def in_float32(w):
    return w @ w


MODEL = nn.Sequential([nn.Dense(16), nn.LayerNorm(), nn.Dense(4)])
PARAMS = jax.eval_shape(MODEL.init, jax.random.key(0), F32)


def loss(params, x):
    return jnp.mean(jnp.square(MODEL.apply(params, x)))


HOLDS = {
    "no upcast": lambda: assert_no_upcast(healthy, X, W),
    "no upcast, jitted": lambda: assert_no_upcast(jax.jit(healthy), x=X, w=W),
    "no upcast in float32": lambda: assert_no_upcast(in_float32, F32),
    "no upcast under autocast": lambda: assert_no_upcast(
        jax.grad(jaxmp.autocast(loss)), PARAMS, F32, policy="mixed_bfloat16"
    ),
    "matmuls": lambda: assert_matmuls_in("bfloat16", healthy, X, W),
    "matmuls by a short name": lambda: assert_matmuls_in("bf16", healthy, X, W),
    "matmuls by dtype": lambda: assert_matmuls_in(jnp.float32, in_float32, F32),
    "matmuls of a step": lambda: assert_matmuls_in(
        "float16", jax.grad(jaxmp.autocast(loss, "mixed_float16")), PARAMS, F32
    ),
    "integers are not floating matmuls": lambda: assert_matmuls_in(
        "bfloat16", lambda x, w, i: (healthy(x, w), i @ i), X, W, np.ones((2, 2), int)
    ),
}


@pytest.mark.parametrize("case", HOLDS)
def test_it_holds(case):
    HOLDS[case]()


FAILS = {
    "upcast": (
        lambda: assert_no_upcast(leaky, X, W),
        "assert_no_upcast",
        ("1 upcast", "(leaky)", "scalar of float32, 0.5", "Python number, 0.5"),
    ),
    "upcast in a gradient": (
        lambda: assert_no_upcast(
            jax.grad(lambda x, w: leaky(x, w).astype(jnp.float32).sum()), X, W
        ),
        "assert_no_upcast",
        ("test_assertions.py:", "(leaky)", "2 matmuls then in float32"),
    ),
    "matmuls": (
        lambda: assert_matmuls_in("bfloat16", leaky, X, W),
        "assert_matmuls_in",
        ("1 of 1 matmuls are not in bfloat16", "(leaky)", "float32 and bfloat16"),
    ),
    "matmuls of the other half": (
        lambda: assert_matmuls_in("float16", healthy, X, W),
        "assert_matmuls_in",
        ("not in float16", "dot_general of bfloat16"),
    ),
    "no matmuls": (
        lambda: assert_matmuls_in("float16", jnp.sin, X),
        "assert_matmuls_in",
        ("no floating matmul",),
    ),
    "many matmuls": (
        lambda: assert_matmuls_in("bfloat16", loss, PARAMS, F32),
        "assert_matmuls_in",
        ("2 of 2", "layers_0", "layers_2", "(1 x)"),
    ),
    "a leaf": (
        lambda: assert_precision_close(
            {"w": jnp.ones(3), "b": jnp.ones(2)},
            {"w": jnp.ones(3), "b": jnp.array([1.0, 1.5])},
        ),
        "assert_precision_close",
        (
            *("1 of 2 leaves", "b is 27.74% off", "at [1] is 1, not 1.5"),
            *("4 roundings", "3.12%"),
        ),
    ),
    "a scalar": (
        lambda: assert_precision_close(jnp.float32(1), jnp.float32(2)),
        "assert_precision_close",
        ("the array is 50.00% off", "element is 1, not 2"),
    ),
    "nothing expected": (
        lambda: assert_precision_close(jnp.ones(4), jnp.zeros(4)),
        "assert_precision_close",
        ("2 from zero",),
    ),
    "shape": (
        lambda: assert_precision_close([jnp.ones(3)], [jnp.ones((3, 1))]),
        "assert_precision_close",
        ("0 has the shape (3,)", "(3, 1) is expected"),
    ),
    "structure": (
        lambda: assert_precision_close([jnp.ones(3)], {"a": jnp.ones(3)}),
        "assert_precision_close",
        ("the trees differ", "PyTreeDef"),
    ),
    "NaN": (
        lambda: assert_precision_close(jnp.array([1, jnp.nan]), jnp.ones(2)),
        "assert_precision_close",
        ("1 elements that are NaN or infinite",),
    ),
    "no NaN": (
        lambda: assert_precision_close(jnp.ones(2), jnp.array([1, jnp.nan])),
        "assert_precision_close",
        ("not NaN or infinite where that is expected",),
    ),
    "integers": (
        lambda: assert_precision_close({"step": 1}, {"step": 2}),
        "assert_precision_close",
        ("step differs, and is not a floating array",),
    ),
}


@pytest.mark.parametrize("case", FAILS)
def test_it_fails_with_words_that_name_the_fault(case):
    provoke, name, words = FAILS[case]
    with pytest.raises(AssertionError) as caught:
        provoke()
    message = str(caught.value)
    assert message.startswith(f"[jaxmp] Assertion {name} failed: ")
    for word in words:
        assert word in message


# Precision


def values(seed=0):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(32, 32)), "tiny": 1e-6 * rng.normal(size=8)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.bfloat16])
def test_rounding_once_is_close_and_a_hundredth_more_is_not(dtype):
    expected = jax.tree.map(np.float32, values())
    rounded = jax.tree.map(
        lambda x: (x * 2**14).astype(dtype).astype(np.float32) / 2**14, expected
    )
    assert_precision_close(rounded, expected, dtype=dtype, roundings=0.5)
    for leaf in expected:
        off = {**rounded, leaf: rounded[leaf] * 1.05}
        with pytest.raises(AssertionError, match=rf"\n  {leaf} is \d"):
            assert_precision_close(off, expected, dtype=dtype)


def test_float16_is_compared_more_closely_than_bfloat16():
    expected = np.float32(values()["w"])
    rounded = expected.astype(jnp.bfloat16)
    assert_precision_close(rounded, expected)
    with pytest.raises(AssertionError, match="roundings of float16"):
        assert_precision_close(rounded, expected, dtype="float16", roundings=1)


def test_a_network_in_half_is_close_to_itself_in_float32():
    keys = jax.random.split(jax.random.key(0), 2)
    params = MODEL.init(keys[0], jnp.ones((16, 16)))
    x = jax.random.normal(keys[1], (16, 16))
    half = jaxmp.apply_policy(MODEL, "mixed_bfloat16")
    assert_precision_close(half.apply(params, x), MODEL.apply(params, x))


def test_infinite_and_absent_values_are_equal_to_themselves():
    x = {"x": jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1.0]), "none": None, "n": 3}
    assert_precision_close(x, x)


def test_an_absolute_tolerance_is_per_element():
    assert_precision_close(jnp.full(100, 0.5), jnp.zeros(100), atol=0.5)
    with pytest.raises(AssertionError):
        assert_precision_close(jnp.full(100, 0.5), jnp.zeros(100), atol=0.4)


def test_complex_parts_count():
    x = jnp.array([1 + 1j, 2j])
    assert_precision_close(x, x)
    with pytest.raises(AssertionError):
        assert_precision_close(x, x.conj())


# Traces

WRITTEN = {
    "called": lambda fn: assert_max_traces(fn, 2),
    "by keyword": lambda fn: assert_max_traces(fn, n=2),
    "decorator": lambda fn: assert_max_traces(n=2)(fn),
    "decorator with a number": lambda fn: assert_max_traces(2)(fn),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_traces_are_counted_and_not_calls(form):
    def double(x):
        return 2 * x

    f = jax.jit(WRITTEN[form](double))
    for n in (1, 2, 1, 2, 1):
        assert f(jnp.ones(n)).shape == (n,)
    with pytest.raises(AssertionError) as caught:
        f(jnp.ones(3))
    message = str(caught.value)
    assert message.startswith("[jaxmp] Assertion assert_max_traces failed: 'double'")
    for words in ("traced 3 times", "2 allowed", "float32[1]", "float32[3]"):
        assert words in message


def test_calls_without_tracers_do_not_count():
    f = assert_max_traces(lambda x: 2 * x, n=0)
    assert f(1.0) == 2.0
    assert f(jnp.ones(2)).shape == (2,)
    with pytest.raises(AssertionError, match="assert_max_traces"):
        jax.vmap(f)(jnp.ones(2))


def test_a_training_loop_under_a_loss_scale_is_traced_once():
    @jax.jit
    @assert_max_traces(n=1)
    def step(scale, x):
        return scale * 2, x + 1

    state = jnp.float32(1), jnp.ones(3)
    for _ in range(5):
        state = step(*state)


@pytest.mark.parametrize("counted", [assert_max_traces, chex.assert_max_traces])
def test_it_counts_as_chex_does(counted):
    f = jax.jit(counted(lambda x: x, n=1))
    f(jnp.ones(2))
    with pytest.raises(AssertionError):
        f(jnp.ones(3))


# Bad input

BAD_INPUT = {
    "no count": (lambda: assert_max_traces(jnp.sin), ("n=None", "n=1")),
    "negative": (lambda: assert_max_traces(jnp.sin, -1), ("n=-1", "n=1")),
    "jitted": (
        lambda: assert_max_traces(jax.jit(jnp.sin), 1),
        ("already jitted", "jax.jit(assert_max_traces(fn, n=1))"),
    ),
    "not a function": (lambda: assert_max_traces("f", 1), ("'f'", "not a function")),
    "dtype": (
        lambda: assert_matmuls_in("bf17", healthy, X, W),
        ("'bf17'", "'bfloat16'"),
    ),
    "integer dtype": (
        lambda: assert_precision_close(1.0, 1.0, dtype="int32"),
        ("'int32'", "jnp.bfloat16"),
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_with_its_value_and_its_repair(case):
    provoke, words = BAD_INPUT[case]
    with pytest.raises(errors.InvalidAssertion) as caught:
        provoke()
    for word in words:
        assert word in str(caught.value)


def test_what_does_not_trace_is_no_failed_assertion():
    with pytest.raises(errors.StepDoesNotTrace):
        assert_no_upcast(healthy, X)
