"""The migration page: both sides of its diffs run and train alike."""

import functools
import pathlib
import re

import flax.training.dynamic_scale
import flax.training.train_state
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest

import jaxmp

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "coming_from.md"
INTRODUCTION, *SECTIONS = re.split(r"^## From ", PAGE.read_text(), flags=re.M)
SECTIONS = {section.splitlines()[0]: section for section in SECTIONS}
PEERS = {
    "functools": functools,
    "jmp": jmp,
    "train_state": flax.training.train_state,
    "DynamicScale": flax.training.dynamic_scale.DynamicScale,
}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def side(diff, sign):
    """One side of a diff, as source."""
    lines = [line[1:] for line in diff.splitlines() if line[:1] in (sign, " ")]
    return "\n".join(lines) + "\n"


def run(*sources):
    namespace = dict(PEERS)
    for source in (*blocks(INTRODUCTION, "python"), *sources):
        exec(source, namespace)
    return namespace


@pytest.mark.parametrize("section", SECTIONS)
def test_the_new_side_of_each_diff_is_the_code_that_runs(section):
    (diff,) = blocks(SECTIONS[section], "diff")
    assert side(diff, "+") == blocks(SECTIONS[section], "python")[0]


def test_the_step_of_dynamic_scale_trains_alike():
    (diff,) = blocks(SECTIONS["Flax's DynamicScale"], "diff")
    theirs, ours = run(side(diff, "-")), run(side(diff, "+"))
    for _ in range(5):
        for page in (theirs, ours):
            page["state"], page["loss"] = page["train_step"](
                page["state"], page["x"], page["y"]
            )
        assert_alike(theirs["loss"], ours["loss"])
    assert_alike(theirs["state"].params, ours["state"].params)
    scale = theirs["state"].dynamic_scale.scale
    assert float(scale) == float(jaxmp.get_loss_scale(ours["state"]))
    # Its first scale is a Python number; ours is an array.
    assert theirs["train_step"]._cache_size() == 2
    assert ours["train_step"]._cache_size() == 1


def test_the_step_of_jmp_trains_alike():
    (diff,) = blocks(SECTIONS["jmp"], "diff")
    theirs, ours = run(side(diff, "-")), run(side(diff, "+"))
    for _ in range(5):
        *state, theirs["loss"] = theirs["train_step"](
            *(theirs[name] for name in ("params", "opt_state", "loss_scale", "x", "y"))
        )
        theirs["params"], theirs["opt_state"], theirs["loss_scale"] = state
        ours["params"], ours["opt_state"], ours["loss"] = ours["train_step"](
            *(ours[name] for name in ("params", "opt_state", "x", "y"))
        )
        assert_alike(theirs["loss"], ours["loss"])
    assert_alike(theirs["params"], ours["params"])
    scale = theirs["loss_scale"].loss_scale
    assert float(scale) == float(jaxmp.get_loss_scale(ours["opt_state"]))


HISTORIES = np.random.default_rng(0).random((8, 60)) > 0.15


@pytest.mark.parametrize("interval", [1, 2, 3, 7])
def test_scales_move_alike(interval):
    """DynamicScale grows one good step late; jmp and jaxmp grow on the same step."""

    def loss_fn(w, gradient):
        return w * gradient

    flax_scale = flax.training.dynamic_scale.DynamicScale(
        growth_interval=interval - 1,
        scale=jnp.float32(2.0**16),
        fin_steps=jnp.int32(0),
    )
    jmp_scale = jmp.DynamicLossScale(
        jnp.float32(2.0**16), period=interval, min_loss_scale=jnp.float32(2.0**-126)
    )
    tx = jaxmp.loss_scaling(
        optax.sgd(0.0),
        "mixed_float16",
        growth_interval=interval,
        min_scale=2.0**-126,
        max_scale=2.0**126,
    )
    w = jnp.float32(1)

    @jax.jit
    def trajectories(history):
        def step(scales, good):
            flax_scale, (jmp_value, jmp_counter), opt_state = scales
            gradient = jnp.where(good, 1.0, jnp.inf)
            flax_scale = flax_scale.value_and_grad(loss_fn)(w, gradient).dynamic_scale
            # Rebuilt by hand: jmp forgets its minimum wherever JAX flattens it.
            by_jmp = jmp.DynamicLossScale(
                jmp_value, jmp_counter, jmp_scale.period, 2, jmp_scale.min_loss_scale
            ).adjust(good)
            grads = jaxmp.grad(loss_fn)(w, gradient, loss_scale=opt_state)
            _, opt_state = tx.update(grads, opt_state, w)
            ours = opt_state.loss_scale
            scales = flax_scale, (by_jmp.loss_scale, by_jmp.counter), opt_state
            return scales, jnp.stack([flax_scale.scale, by_jmp.loss_scale, ours])

        jmp_state = jmp_scale.loss_scale, jnp.int32(0)
        start = flax_scale, jmp_state, tx.init(w)
        return jax.lax.scan(step, start, history)[1]

    for history in HISTORIES:
        by_flax, by_jmp, ours = trajectories(jnp.asarray(history)).T
        assert len(set(ours.tolist())) > 3
        np.testing.assert_array_equal(ours, by_flax)
        np.testing.assert_array_equal(ours, by_jmp)


def test_a_float16_loss_overflows_the_first_step_of_dynamic_scale_alone():
    def loss_fn(w):
        return w.astype(jnp.float16)

    w = jnp.float32(1)
    scale = flax.training.dynamic_scale.DynamicScale()
    assert not scale.value_and_grad(loss_fn)(w).finite
    state = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16").init(w)
    assert float(jaxmp.grad(loss_fn)(w, loss_scale=state)) == 1


def assert_alike(theirs, ours):
    for x, y in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
