"""Properties of `apply_policy`, crossed with every network of the zoo."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.testing import equations, matmuls, zoo
from jaxmp.testing._functional import path_of
from tests.modules.conftest import FAST_COMPILE
from tests.support.distance import distance, norm
from tests.support.thinning import every_second

POLICIES = ("mixed_bfloat16", "mixed_float16", "bf16-true")
by_kind = sorted(zoo(), key=lambda model: model.kind)
traced = every_second("model policy", by_kind, POLICIES)
# Compiling takes longer than tracing: by default one policy is run, and of the nnx
# networks those with every sort of state.
IN_BOTH = ("mlp", "cnn", "lstm", "encoder", "decoder_cached")


def _is_compiled(model, policy):
    return policy == POLICIES[0] and (model.kind == "linen" or model.name in IN_BOTH)


compiled = pytest.mark.parametrize(
    ("model", "policy"),
    [
        pytest.param(
            model,
            policy,
            marks=() if _is_compiled(model, policy) else pytest.mark.slow,
            id=f"{model}-{policy}",
        )
        for model, policy in itertools.product(by_kind, POLICIES)
    ],
)
FLOAT32 = jnp.dtype(jnp.float32)


def by_path(tree):
    return {path_of(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


def is_norm(path):
    return re.search(r"(^|/)norms?(_\d)?/", path + "/") is not None


def equations_of(step, primitive):
    """The equations of the network, forward and backward, without loss and update."""
    return [
        equation
        for scope, equation in equations(step.jaxpr)
        if "model" in scope and equation.primitive.name == primitive
    ]


def operand_dtypes(step, primitive):
    return {e.invars[0].aval.dtype for e in equations_of(step, primitive)}


def types(tree):
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree
    )


@traced
def test_parameters_are_stored_as_the_policy_says(model, policy, trace_step):
    step, dtypes = trace_step(model, policy), jaxmp.get_policy(policy)
    for path, x in by_path(step.params).items():
        if is_norm(path):
            assert x.dtype == jnp.float32, path
        elif model.frozen and re.fullmatch(model.frozen, path):
            assert x.dtype == dtypes.compute_dtype, path
        else:
            assert x.dtype == dtypes.param_dtype, path


@traced
def test_every_matmul_forward_and_backward_is_in_the_compute_dtype(
    model, policy, trace_step
):
    compute = jaxmp.get_policy(policy).compute_dtype
    found, plain = [
        [m for m in matmuls(step.jaxpr) if "model" in m.scope]
        for step in (trace_step(model, policy), trace_step(model, None))
    ]
    assert len(found) == len(plain) > 0
    assert {d for m in found for d in (*m.operands, m.output)} == {compute}


@traced
def test_norms_compute_in_float32(model, policy, trace_step):
    step = trace_step(model, policy)
    has_norm = any(is_norm(path) for path in by_path(step.params))
    assert operand_dtypes(step, "rsqrt") == ({FLOAT32} if has_norm else set())


@every_second(
    "model policy",
    [m for m in by_kind if m.name.startswith(("encoder", "decoder"))],
    POLICIES,
)
def test_softmax_of_flax_attention_is_in_float32(model, policy, trace_step):
    assert operand_dtypes(trace_step(model, policy), "exp") == {FLOAT32}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    "model", [m for m in zoo() if m.name == "recommender"], ids=str
)
def test_tables_are_looked_up_and_never_cast(model, policy, trace_step):
    """On one device: several would gather them in half, so the cast is traced."""
    step = trace_step(model, policy)
    tables = {
        x.shape for path, x in by_path(step.params).items() if "embedding" in path
    }
    assert tables
    lowered = jax.jit(step.function).lower(*step.arguments)
    text = lowered.compile(FAST_COMPILE).as_text()
    for rows, width in tables:
        assert f"f32[{rows},{width}]" in text
        assert f"bf16[{rows},{width}]" not in text
        assert f" f16[{rows},{width}]" not in text


@traced
def test_a_step_returns_the_types_that_it_took(model, policy, trace_step):
    step = trace_step(model, policy)
    assert types(step.results[0]) == types(step.arguments)


@traced
def test_state_keeps_its_own_dtypes(model, policy, trace_step):
    plain = by_path(trace_step(model, None).results[1]["state"])
    state = by_path(trace_step(model, policy).results[1]["state"])
    assert list(plain) == list(state)
    for path, x in state.items():
        is_made_here = model.kind == "linen" and re.search("cached_(key|value)", path)
        compute = jaxmp.get_policy(policy).compute_dtype
        assert x.dtype == (compute if is_made_here else plain[path].dtype), path


@compiled
def test_three_steps_compile_once(model, policy, run_step):
    _, compiled = run_step(model, policy)
    assert compiled == 1


@compiled
@pytest.mark.parametrize("what", ["loss", "output", "grads", "state"])
def test_within_what_the_dtype_allows_of_float32(model, policy, what, run_step):
    half = jaxmp.get_policy(policy).compute_dtype
    exact = run_step(model, None)[0][what]
    rounded = run_step(model, None, half)[0][what]
    result = run_step(model, policy)[0][what]
    eps = float(jnp.finfo(half).eps)
    whole = norm(exact)
    for (path, x), x_exact, x_rounded in zip(
        jax.tree_util.tree_leaves_with_path(result),
        jax.tree.leaves(exact),
        jax.tree.leaves(rounded),
        strict=True,
    ):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(x, x_exact)
            continue
        # Rounding the parameters alone shows what the network makes of an error. The
        # gradient of a bias before a norm is zero, and in half it is noise.
        unavoidable = distance(x_rounded, x_exact)
        floor = eps * (norm(x_exact) + 0.2 * whole)
        assert distance(x, x_exact) < 2.5 * (unavoidable + floor), path_of(path)
