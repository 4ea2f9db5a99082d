"""The table in docs/nesting.md, row by row: what it says is what happens."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jaxmp
from jaxmp.loss_scale.state import LossScaleState

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "nesting.md"
COLUMNS = ["scale backs off", "parameters stay", "other state stays"]
COLUMNS += ["training goes on"]


def rows():
    table = [
        [cell.strip() for cell in line.strip("|\n").split(" | ")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    ]
    header, *body = table
    assert header[1:-1] == COLUMNS
    return [
        (code.strip("` "), dict(zip(COLUMNS, claims, strict=True)))
        for code, *claims, _ in body
    ]


def scaled(inner):
    return jaxmp.loss_scaling(inner, "mixed_float16")


def made(code):
    schedule = optax.linear_schedule(0.1, 0.0, 100)
    return eval(code, {"optax": optax, "scaled": scaled, "schedule": schedule})


def runner(tx):
    """Takes steps with gradients of 1, or of infinity where a step is False."""

    @jax.jit
    def step(params, state, is_good):
        is_lookahead = isinstance(params, optax.LookaheadParams)
        grad = jnp.where(is_good, 1.0, jnp.inf)
        grads = jax.tree.map(
            lambda p: jnp.full_like(p, grad), params.fast if is_lookahead else params
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(steps, params, state=None):
        state = tx.init(params) if state is None else state
        for is_good in steps:
            params, state = step(params, state, is_good)
        return params, state

    return run


def without_scale_counters(state):
    """Everything but the scalars of the loss scale itself."""
    return jax.tree.map(
        lambda x: x.inner_state if isinstance(x, LossScaleState) else x,
        state,
        is_leaf=lambda x: isinstance(x, LossScaleState),
    )


def same_bits(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return [np.asarray(x).tobytes() for x in a] == [np.asarray(x).tobytes() for x in b]


def observed(code):
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    if "lookahead" in code:
        params = optax.LookaheadParams.init_synced(params)
    run = runner(made(code))
    before = run([True] * 3, params)
    after = run([False], *before)
    params, _ = run([True] * 8, *after)
    leaves = list(zip(*map(jax.tree.leaves, (params, after[0])), strict=True))
    facts = [
        float(jaxmp.get_loss_scale(after[1])) == 2.0**15,
        same_bits(before[0], after[0]),
        same_bits(*map(without_scale_counters, (before[1], after[1]))),
        all(np.isfinite(new).all() and (new != old).all() for new, old in leaves),
    ]
    return dict(zip(COLUMNS, ["yes" if fact else "no" for fact in facts], strict=True))


@pytest.mark.parametrize(("code", "claims"), rows(), ids=lambda x: str(x)[:60])
def test_row_of_the_table(code, claims):
    assert observed(code) == claims


def test_the_table_has_the_rows_that_matter():
    codes = " ".join(code for code, _ in rows())
    for name in (
        "clip(",
        "clip_by_global_norm",
        "apply_if_finite",
        "MultiSteps",
        "add_decayed_weights",
        "trace",
        "lookahead",
        "schedule_free",
        "masked",
    ):
        assert f"optax.{name}" in codes or f"optax.contrib.{name}" in codes


def test_apply_if_finite_around_it_never_backs_off():
    run = runner(optax.apply_if_finite(scaled(optax.adam(0.1)), 100))
    _, state = run([False] * 50, {"w": jnp.ones(2)})
    assert float(jaxmp.get_loss_scale(state)) == 2.0**16


def test_multi_steps_around_it_is_poisoned_for_ever():
    run = runner(optax.MultiSteps(scaled(optax.adam(0.1)), 2))
    _, state = run([True, False, *[True] * 60], {"w": jnp.ones(2)})
    assert np.isnan(state.acc_grads["w"]).all()
    assert int(jaxmp.loss_scale_metrics(state)["applied_steps"]) == 0
    assert float(jaxmp.get_loss_scale(state)) == 1.0


def test_several_scales_in_one_state_are_refused_where_one_is_asked_for():
    tx = optax.partition(
        {"a": scaled(optax.sgd(0.1)), "b": scaled(optax.sgd(0.1))},
        {"w": "a", "b": "b"},
    )
    state = tx.init({"w": jnp.ones(2), "b": jnp.ones(1)})
    with pytest.raises(
        jaxmp.errors.MultipleLossScales, match="There are 2 loss scales"
    ):
        jaxmp.get_loss_scale(state)
