"""What an optimizer loses in half precision, by name and by line."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxmp
from jaxmp.errors import DtypeMismatch
from jaxmp.optimizers import check_dtypes, lint_optimizer

HALF = ["bfloat16", "float16"]


def params(dtype):
    return {"w": jnp.ones((4, 4), dtype)}


def kinds(tx, dtype, **extra_args):
    found = lint_optimizer(tx, params(dtype), **extra_args)
    return {finding.kind for finding in found}


def test_eps_that_becomes_zero_is_named_with_its_line():
    found = lint_optimizer(optax.adam(1e-3), params("float16"))
    literal = next(x for x in found if x.kind == "literal")
    assert "1e-08 becomes 0 in float16" in str(literal)
    assert "optax" in literal.source
    assert literal.source.rsplit(":")[-1].isdigit()


def test_b2_that_becomes_one_is_named_with_its_line():
    found = lint_optimizer(optax.adam(1e-3), params("bfloat16"))
    assert any("0.999 becomes 1 in bfloat16" in str(x) for x in found)


def test_injected_hyperparameters_are_named():
    tx = optax.inject_hyperparams(optax.adamw)(1e-3)
    found = {(x.source, x.kind): str(x) for x in lint_optimizer(tx, params("bfloat16"))}
    assert "0.999 becomes 1" in found["b2", "hyperparameter"]


def test_a_product_written_in_python_is_found():
    shrink = optax.stateless(lambda g, p: jax.tree.map(lambda x: x * (1 - 1e-5), g))
    found = lint_optimizer(shrink, params("bfloat16"))
    literal = next(x for x in found if x.kind == "literal")
    assert "0.99999 becomes 1" in str(literal)
    assert "test_lint.py" in literal.source


def test_a_decay_that_moves_nothing_is_found():
    found = lint_optimizer(optax.adamw(1e-3, weight_decay=0.01), params("bfloat16"))
    assert any("moves by 1e-05 a step" in str(x) for x in found if x.kind == "decay")
    strong = optax.adamw(1.0, weight_decay=0.1)
    assert "decay" not in kinds(strong, "bfloat16")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "wrap",
    [
        jaxmp.master_weights,
        lambda tx: jaxmp.stochastic_rounding(tx, seed=0),
        lambda tx: jaxmp.loss_scaling(jaxmp.master_weights(tx), "mixed_float16"),
    ],
)
def test_nothing_is_found_where_nothing_is_lost(dtype, wrap):
    for tx in optax.adamw(1e-3), optax.inject_hyperparams(optax.adamw)(1e-3):
        assert lint_optimizer(wrap(tx), params(dtype)) == []


def test_float32_parameters_are_clean():
    assert lint_optimizer(optax.adamw(1e-3), params("float32")) == []


def test_half_weights_without_a_copy_and_half_moments_are_found():
    assert {"weights", "moments"} <= kinds(optax.adam(1e-3), "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "rounding", "expected"),
    [
        ("bfloat16", "nearest", {"moments"}),
        ("bfloat16", "stochastic", set()),
        ("float16", "stochastic", {"moments"}),
    ],
)
def test_coarse_moments(dtype, rounding, expected):
    moments = jaxmp.cast_state(optax.adam(1e-3), dtype, rounding=rounding)
    assert kinds(jaxmp.master_weights(moments), "bfloat16") == expected


def test_abstract_parameters_and_extra_arguments():
    shapes = jax.eval_shape(lambda: params("bfloat16"))
    tx = jaxmp.master_weights(optax.contrib.momo(1e-3))
    assert lint_optimizer(tx, shapes, value=jnp.float32(1)) == []


# check_dtypes


def test_check_dtypes_of_parameters():
    tree = {"w": jnp.ones(2), "n": jnp.int32(1), "key": jax.random.key(0)}
    check_dtypes(tree, "mixed_bfloat16")
    with pytest.raises(
        DtypeMismatch, match=r"(?s)1 of 3.*w: float32, should be bfloat16"
    ):
        check_dtypes(tree, "bfloat16")


def test_check_dtypes_of_a_state_against_a_fresh_one():
    tx = jaxmp.loss_scaling(jaxmp.master_weights(optax.adam(1e-3)), "mixed_bfloat16")
    wanted = jax.eval_shape(tx.init, params("bfloat16"))
    state = tx.init(params("bfloat16"))
    check_dtypes(state, wanted)
    lowered = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state
    )
    with pytest.raises(DtypeMismatch) as error:
        check_dtypes(lowered, wanted)
    assert "inner_state/master/w: bfloat16, should be float32" in str(error.value)
    assert "loss_scale: bfloat16, should be float32" in str(error.value)


def test_check_dtypes_shows_the_first_of_many():
    tree = {f"w{i:02}": jnp.ones(1) for i in range(30)}
    with pytest.raises(DtypeMismatch, match="and 10 more"):
        check_dtypes(tree, "bfloat16")
