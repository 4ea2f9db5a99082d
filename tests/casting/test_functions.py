"""Every plain function of the list, crossed with what autocast promises of any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.testing import matmuls
from tests.support.functions import FUNCTIONS, example_arguments
from tests.support.thinning import every_second

HALF = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
# A few roundings of the unit in the last place, relative to the largest element.
TOLERANCE = {"mixed_bfloat16": 0.06, "mixed_float16": 0.01}
DIFFERENTIABLE = [f for f in FUNCTIONS if f.name != "while"]

functions = pytest.mark.parametrize("case", FUNCTIONS, ids=lambda f: f.name)
differentiable = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda f: f.name)


def name_of(value):
    return getattr(value, "name", str(value))


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(e).max() + 1e-6
        np.testing.assert_allclose(a / scale, e / scale, atol=tolerance)


def loss_of(fn):
    return lambda w, x: (
        sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(fn(w, x)) if leaf.ndim)
        + sum(leaf for leaf in jax.tree.leaves(fn(w, x)) if not leaf.ndim)
    )


@functions
def test_output_avals_are_those_of_the_function(case):
    args = example_arguments()
    before = jax.eval_shape(case.fn, *args)
    after = jax.eval_shape(jaxmp.autocast(case.fn), *args)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )


@every_second("case policy", FUNCTIONS, HALF, ids=name_of)
def test_values_are_close_to_float32(case, policy):
    args = example_arguments()
    actual = jax.jit(jaxmp.autocast(case.fn, policy))(*args)
    assert_close(actual, case.fn(*args), TOLERANCE[policy])


@every_second("case policy", DIFFERENTIABLE, HALF, ids=name_of)
def test_gradients_are_float32_and_close(case, policy):
    args = example_arguments()
    expected = jax.grad(loss_of(case.fn), (0, 1))(*args)
    cast = jaxmp.autocast(loss_of(case.fn), policy)
    actual = jax.jit(jax.grad(cast, (0, 1)))(*args)
    assert {g.dtype for g in actual} == {jnp.dtype("float32")}
    assert_close(actual, expected, 2 * TOLERANCE[policy])


@pytest.mark.parametrize("half_residuals", [True, False])
@differentiable
def test_every_matmul_runs_in_half_forward_and_backward(case, half_residuals):
    cast = jaxmp.autocast(loss_of(case.fn), half_residuals=half_residuals)
    jaxpr = jax.make_jaxpr(jax.grad(cast, (0, 1)))(*example_arguments())
    dtypes = {(*m.operands, m.output) for m in matmuls(jaxpr)}
    assert dtypes == ({(jnp.dtype("bfloat16"),) * 3} if case.has_matmul else set())


@differentiable
def test_the_gradient_inside_is_in_half_too(case):
    grad = jax.grad(loss_of(case.fn), (0, 1))
    cast = jaxmp.autocast(grad)
    args = example_arguments()
    dtypes = {d for m in matmuls(jax.make_jaxpr(cast)(*args)) for d in m.operands}
    assert dtypes == ({jnp.dtype("bfloat16")} if case.has_matmul else set())
    assert_close(cast(*args), grad(*args), 0.12)


@functions
def test_one_compilation_serves_all_calls(case):
    jitted = jax.jit(jaxmp.autocast(case.fn))
    for _ in range(2):
        jitted(*example_arguments())
    assert jitted._cache_size() == 1


@functions
def test_float32_policy_changes_nothing(case):
    args = example_arguments()
    actual = jax.jit(jaxmp.autocast(case.fn, "float32"))(*args)
    jax.tree.map(np.testing.assert_array_equal, actual, jax.jit(case.fn)(*args))


@functions
def test_no_cast_is_undone(case):
    """No float32 value that was widened from half is narrowed again at once."""

    def undone(jaxpr):
        made, count = {}, 0
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            if eqn.primitive.name == "convert_element_type":
                source = eqn.invars[0]
                count += made.get(id(source)) == eqn.params["new_dtype"]
                made[id(eqn.outvars[0])] = source.aval.dtype
            for value in eqn.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    count += undone(inner) if hasattr(inner, "eqns") else 0
        return count

    assert undone(jax.make_jaxpr(jaxmp.autocast(case.fn))(*example_arguments())) == 0


@every_second("case", DIFFERENTIABLE, ids=name_of)
def test_transformations_go_through(case):
    w, x = example_arguments()
    cast = jaxmp.autocast(loss_of(case.fn))
    assert jax.vmap(cast, (None, 0))(w, jnp.stack([x, x])).shape == (2,)
    np.testing.assert_allclose(
        jax.grad(jax.checkpoint(cast))(w, x), jax.grad(cast)(w, x), rtol=0.1, atol=0.1
    )
    if case.name != "custom_rules":  # a custom_vjp has no forward mode
        jax.jvp(cast, (w, x), (w, x))
        jax.linearize(cast, w, x)[1](w, x)
