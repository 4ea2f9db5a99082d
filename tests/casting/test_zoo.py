"""Every network of the zoo in plain float32, crossed with what autocast promises."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmp
from jaxmp.testing import equations, matmuls, zoo
from jaxmp.testing._functional import path_of
from tests.support.distance import distance, norm

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
# Compiling is most of the time, and most of that is LLVM's optimisation.
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# Policy and half_residuals; by default the first.
SETTINGS = (
    ("mixed_bfloat16", True),
    ("mixed_bfloat16", False),
    ("mixed_float16", True),
)
every_setting = pytest.mark.parametrize(
    "setting",
    [SETTINGS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS[1:])],
    ids=["bfloat16", "bfloat16-as_jax_keeps", "float16"],
)
# The two forms of a network differ most in what their state is; all linen networks are
# run by default, and of the nnx ones those with every sort of state and of loop.
IN_BOTH = ("mlp", "cnn", "lstm", "encoder", "decoder_cached")
run_model = pytest.mark.parametrize(
    "model",
    [
        m
        if m.kind == "linen" or m.name in IN_BOTH
        else pytest.param(m, marks=pytest.mark.slow)
        for m in zoo()
    ],
    ids=str,
)
# The callback that records draws is not allowed in a scan of linen.
with_draws = pytest.mark.parametrize(
    "model",
    [m for m in zoo() if m.name == "mlp" or str(m) == "encoder-nnx"],
    ids=str,
)


class Gradient(NamedTuple):
    """The loss of a network and its gradient, under autocast or not."""

    loss: Any
    jitted: Any
    arguments: Any
    jaxpr: Any
    results: Any


@functools.cache
def gradient(model, setting):
    """Traces `(params, state)` -> loss, output, new state and gradients."""
    module = nnx.eval_shape(model.make) if model.kind == "nnx" else model.make()
    apply, *arguments = model.functional(module)

    def loss(params, state):
        output, state = apply(params, state, *model.inputs)
        return model.loss(output, model.target), (output, state)

    if setting is not None:
        policy, half_residuals = setting
        loss = jaxmp.autocast(loss, policy, half_residuals=half_residuals)

    def step(params, state):
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, (output, state)), grads = value_and_grad(params, state)
        return {"loss": value, "output": output, "state": state, "grads": grads}

    jitted = jax.jit(step, compiler_options=FAST_COMPILE)
    traced = jitted.trace(*arguments)
    return Gradient(loss, jitted, arguments, traced.jaxpr, traced.out_info)


@functools.cache
def run(model, setting, perturbed_in=None):
    """The results of a step; `perturbed_in` rounds the parameters to a dtype first."""
    found = gradient(model, setting)
    params, state = found.arguments
    if perturbed_in is not None:
        params = jax.tree.map(lambda x: x.astype(perturbed_in).astype(x.dtype), params)
    return found.jitted(params, state)


def types(tree):
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree
    )


@every_setting
@run_model
def test_types_are_those_of_the_function(model, setting):
    plain, cast = gradient(model, None), gradient(model, setting)
    assert types(cast.results) == types(plain.results)
    grads = jax.tree.leaves(cast.results["grads"])
    assert {x.dtype for x in grads} == {FLOAT32}


@every_setting
@run_model
def test_every_matmul_forward_and_backward_is_in_half_and_none_is_repeated(
    model, setting
):
    half = jaxmp.get_policy(setting[0]).compute_dtype
    found = matmuls(gradient(model, setting).jaxpr)
    assert len(found) == len(matmuls(gradient(model, None).jaxpr)) > 0
    assert {d for m in found for d in (*m.operands, m.output)} == {half}


@every_setting
@run_model
def test_exponentials_and_roots_are_in_float32(model, setting):
    found = [
        equation.invars[0].aval.dtype
        for _, equation in equations(gradient(model, setting).jaxpr)
        if equation.primitive.name in ("exp", "log", "rsqrt")
    ]
    assert set(found) <= {FLOAT32}


@every_setting
@pytest.mark.parametrize(
    "model", [m for m in zoo() if m.name == "recommender"], ids=str
)
def test_tables_are_looked_up_and_never_cast(model, setting):
    """On one device: several would gather them in half, so the cast is traced."""
    found = gradient(model, setting)
    tables = {
        x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(found.arguments[0])
        if path_of(path).endswith("embedding")
    }
    assert tables
    text = found.jitted.lower(*found.arguments).compile().as_text()
    for rows, width in tables:
        assert f"f32[{rows},{width}]" in text
        assert f"bf16[{rows},{width}]" not in text
        assert f" f16[{rows},{width}]" not in text


@every_setting
@run_model
def test_one_compilation_serves_all_steps(model, setting):
    found = gradient(model, setting)
    params, state = found.arguments
    for _ in range(2):
        state = found.jitted(params, state)["state"]
    assert found.jitted._cache_size() == 1


@every_setting
@run_model
@pytest.mark.parametrize("what", ["loss", "output", "grads", "state"])
def test_within_what_the_dtype_allows_of_float32(model, setting, what):
    half = jaxmp.get_policy(setting[0]).compute_dtype
    exact = run(model, None)[what]
    rounded = run(model, None, half)[what]
    eps = float(jnp.finfo(half).eps)
    whole = norm(exact)
    for (path, x), x_exact, x_rounded in zip(
        jax.tree_util.tree_leaves_with_path(run(model, setting)[what]),
        jax.tree.leaves(exact),
        jax.tree.leaves(rounded),
        strict=True,
    ):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_array_equal(bits(x), bits(x_exact))
            continue
        # Rounding the parameters alone shows what the network makes of an error. The
        # gradient of a bias before a norm is zero, and in half it is noise.
        unavoidable = distance(x_rounded, x_exact)
        floor = eps * (norm(x_exact) + 0.2 * whole)
        assert distance(x, x_exact) < 2.5 * (unavoidable + floor), path_of(path)


@with_draws
def test_random_draws_are_bit_identical(model, monkeypatch):
    draw, drawn = jax.random.bernoulli, []

    def recorded(*args, **kwargs):
        mask = draw(*args, **kwargs)
        jax.debug.callback(lambda mask: drawn.append(np.asarray(mask)), mask)
        return mask

    monkeypatch.setattr(jax.random, "bernoulli", recorded)
    seen = []
    for setting in (None, SETTINGS[0]):
        found = gradient.__wrapped__(model, setting)
        jax.jit(found.loss, compiler_options=FAST_COMPILE)(*found.arguments)
        jax.effects_barrier()
        seen.append(sorted(mask.tobytes() for mask in drawn))
        drawn.clear()
    assert seen[0] == seen[1] != []


class Small(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def test_nnx_modules_as_arguments_are_written_to():
    """Dropout's count advances, and the statistics of BatchNorm move."""

    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    def leaves(model):
        return list(map(bits, jax.tree.leaves(nnx.state(model))))

    x = jax.random.normal(jax.random.key(1), (4, 8))
    plain = Small(nnx.Rngs(0))
    cast = nnx.clone(plain)
    before = leaves(cast)
    expected = nnx.jit(loss)(plain, x)
    actual = jaxmp.autocast(loss)(cast, x)
    np.testing.assert_allclose(actual, expected, rtol=0.02)
    assert types(leaves(cast)) == types(before)
    moved = [(a != b).any() for a, b in zip(before, leaves(cast), strict=True)]
    assert sum(moved) == 3
    for a, b in zip(leaves(cast), leaves(plain), strict=True):
        is_float = jnp.issubdtype(a.dtype, jnp.floating)
        np.testing.assert_allclose(a, b, atol=0.01 if is_float else 0)


def test_equinox_modules_are_pytrees():
    model = eqx.nn.MLP(8, "scalar", 32, 2, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (16, 8))

    def loss(model, x):
        return jnp.mean((jax.vmap(model)(x) - x.sum(1)) ** 2)

    cast = jaxmp.autocast(loss)
    step = eqx.filter_jit(eqx.filter_value_and_grad(cast))
    (actual, grads), (expected, plain) = (
        step(model, x),
        eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, x),
    )
    np.testing.assert_allclose(actual, expected, rtol=0.02)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        assert g.dtype == FLOAT32
        assert distance(g, e) < 0.03 * norm(e)
    params, static = eqx.partition(model, eqx.is_array)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: cast(eqx.combine(p, static), x)))(params)
    found = matmuls(jaxpr)
    assert {d for m in found for d in (*m.operands, m.output)} == {BFLOAT16}
    assert len(found) == 3 + 3 + 2


def bits(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x
