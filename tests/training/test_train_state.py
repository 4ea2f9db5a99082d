"""`TrainState`: Flax's, until a gradient is non-finite or a policy changes."""

import functools
import pickle
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.training import train_state

import jaxmp
from jaxmp.errors import (
    CheckpointPolicyMismatch,
    GradientTreeMismatch,
    InvalidCheckpoint,
    LossScaleOptionError,
    LossScalePolicyMismatch,
    PolicyError,
    TrainStateOptionError,
)
from jaxmp.training import restore

PARAMS = {"b": jnp.array([0.5, -0.0, 1e-40]), "w": jnp.linspace(-1.0, 1.0, 6)}
ONES = jax.tree.map(jnp.ones_like, PARAMS)
NANS = {**ONES, "w": ONES["w"].at[0].set(jnp.nan)}


class WithStats(jaxmp.TrainState):
    batch_stats: Any
    epoch: int = 0


def make(policy="mixed_float16", params=PARAMS, cls=jaxmp.TrainState, **kwargs):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    return cls.create(apply_fn=None, params=params, tx=tx, policy=policy, **kwargs)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


# Creation


def test_create_wraps_the_optimizer_once():
    tx = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16", init_scale=8.0)
    state = jaxmp.TrainState.create(
        apply_fn=None, params=PARAMS, tx=tx, policy="mixed_float16"
    )
    assert state.tx is tx
    assert float(jaxmp.get_loss_scale(state)) == 8.0
    assert float(jaxmp.get_loss_scale(make())) == 2.0**16
    assert float(jaxmp.get_loss_scale(make("mixed_bfloat16"))) == 1.0


def test_create_allocates_one_optimizer_state():
    allocated = []

    def init(params):
        is_real = not isinstance(params["w"], jax.core.Tracer)
        allocated.extend([1] * is_real)
        return optax.EmptyState()

    tx = optax.GradientTransformation(init, lambda updates, state, params: None)
    for optimizer in (tx, jaxmp.loss_scaling(tx, "float32")):
        allocated.clear()
        jaxmp.TrainState.create(
            apply_fn=None, params=PARAMS, tx=optimizer, policy="float32"
        )
        assert allocated == [1]


@pytest.mark.parametrize(
    "tx",
    [
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.adamw(optax.linear_schedule(0.1, 0.0, 5)),
        optax.inject_hyperparams(optax.sgd)(0.1),
        jaxmp.static_loss_scaling(optax.sgd(0.1), 8),
    ],
)
def test_any_optimizer_steps_and_skips(tx):
    state = jaxmp.TrainState.create(
        apply_fn=None, params=PARAMS, tx=tx, policy="mixed_float16"
    )
    for _ in range(2):
        state = state.apply_gradients(grads=ONES, value=1.0)
    skipped = state.apply_gradients(grads=NANS, value=1.0)
    assert_same(skipped.params, state.params)
    assert (skipped.params["w"] != PARAMS["w"]).all()
    assert int(skipped.step) == 2


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(tx, optax.clip(1.0)),
        lambda tx: optax.partition({"a": tx}, {"w": "a", "b": "a"}),
    ],
)
@pytest.mark.parametrize(
    ("of_scale", "of_state"),
    [
        ("mixed_float16", "mixed_bfloat16"),
        ("mixed_bfloat16", "mixed_float16"),
        ("float16", "float32"),
        ("p=f32,c=f32,o=f16", "float32,matmul=tf32"),
    ],
)
def test_a_loss_scale_of_another_policy_names_both(wrap, of_scale, of_state):
    tx = wrap(jaxmp.loss_scaling(optax.adam(0.1), of_scale))
    with pytest.raises(LossScalePolicyMismatch) as error:
        jaxmp.TrainState.create(apply_fn=None, params=PARAMS, tx=tx, policy=of_state)
    for policy in (of_scale, of_state):
        assert repr(str(jaxmp.get_policy(policy))) in str(error.value)
    assert "dynamic_loss_scaling(optimizer)" in str(error.value)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
@pytest.mark.parametrize(
    ("tx", "scale"),
    [
        (jaxmp.dynamic_loss_scaling(optax.adam(0.1)), 2.0**16),
        (jaxmp.static_loss_scaling(optax.adam(0.1), 1024), 1024.0),
        (jaxmp.loss_scaling(optax.adam(0.1), 1024), 1024.0),
        (jaxmp.loss_scaling(optax.adam(0.1), jaxmp.NoOpLossScale()), 1.0),
        (jaxmp.loss_scaling(optax.adam(0.1), jmp.NoOpLossScale()), 1.0),
        (jaxmp.loss_scaling(optax.adam(0.1), jmp.StaticLossScale(8.0)), 8.0),
        (
            jaxmp.loss_scaling(
                optax.adam(0.1), jmp.DynamicLossScale(jnp.float32(2.0**9))
            ),
            2.0**9,
        ),
    ],
)
def test_a_scale_that_names_no_policy_goes_with_every_policy(tx, scale, policy):
    state = jaxmp.TrainState.create(apply_fn=None, params=PARAMS, tx=tx, policy=policy)
    assert float(jaxmp.get_loss_scale(state)) == scale


def test_policies_that_need_the_same_scale_go_together():
    for of_scale, of_state in (("bfloat16", "mixed_bfloat16"), ("16-mixed", "float16")):
        tx = jaxmp.loss_scaling(optax.adam(0.1), of_scale)
        jaxmp.TrainState.create(apply_fn=None, params=PARAMS, tx=tx, policy=of_state)


def test_options_of_the_loss_scale_pass_through():
    state = make(init_scale=8.0, growth_interval=1, max_scale=16.0, hysteresis=3)
    for expected in (16.0, 16.0):
        state = state.apply_gradients(grads=ONES)
        assert float(jaxmp.get_loss_scale(state)) == expected
    assert int(state.opt_state.hysteresis_left) == 3
    careless = make("float32", skip_nonfinite=False, init_scale=8.0)
    assert not jaxmp.all_finite(careless.apply_gradients(grads=NANS).params)
    step = jax.vmap(
        lambda state, g: state.apply_gradients(grads=g), (None, 0), axis_name="data"
    )
    both = jax.tree.map(lambda *g: jnp.stack(g), ONES, NANS)
    assert step(make(axis_name="data"), both).step.tolist() == [0, 0]
    assert step(make(), both).step.tolist() == [1, 0]


def test_a_field_of_a_subclass_wins_over_an_option():
    class WithScale(jaxmp.TrainState):
        init_scale: Any = None

    state = make(cls=WithScale, init_scale=7.0, growth_interval=3)
    assert state.init_scale == 7.0
    assert float(jaxmp.get_loss_scale(state)) == 2.0**16


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"init_scal": 8.0}, TrainStateOptionError, ("'init_scal'", "'init_scale'")),
        ({"batch_stats": {}}, TrainStateOptionError, ("'batch_stats'", "Fields: step")),
        ({"init_scale": 7.0}, LossScaleOptionError, ("init_scale=7.0", "4 or 8")),
        (
            {
                "tx": jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16"),
                "init_scale": 8.0,
            },
            TrainStateOptionError,
            ("already has a loss scale", "policy, init_scale=8.0"),
        ),
        (
            {"policy": jmp.DynamicLossScale(jnp.float32(8))},
            PolicyError,
            ("policy=DynamicLossScale", "loss_scaling(optimizer, scale)"),
        ),
        (
            {"policy": jaxmp.StaticLossScale(8)},
            PolicyError,
            ("policy=StaticLossScale",),
        ),
    ],
)
def test_what_create_cannot_use_is_an_error_by_name(kwargs, error, words):
    given = {"tx": optax.adam(0.1), "policy": "mixed_float16", **kwargs}
    with pytest.raises(error) as raised:
        jaxmp.TrainState.create(apply_fn=None, params=PARAMS, **given)
    for word in words:
        assert word in str(raised.value)


def test_a_bad_policy_is_quoted():
    with pytest.raises(PolicyError, match="mixed_floot16"):
        make("mixed_floot16")


def test_the_step_of_a_new_state_is_an_int32_array():
    state = make()
    assert state.step.dtype == jnp.int32
    assert not state.step.weak_type
    assert state.policy == jaxmp.get_policy("mixed_float16")


# Steps


def test_good_steps_are_those_of_flax():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    flax_state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    state = make("float32")
    for scale in (1.0, 0.5, 0.25):
        grads = jax.tree.map(lambda g, s=scale: g * s, ONES)
        flax_state = flax_state.apply_gradients(grads=grads)
        state = state.apply_gradients(grads=grads)
    assert_same(state.params, flax_state.params)
    assert_same(state.opt_state.inner_state, flax_state.opt_state)
    assert int(state.step) == flax_state.step == 3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_skip_keeps_every_bit_subnormal_parameters_included(compiled):
    step = lambda state, grads: state.apply_gradients(grads=grads)  # noqa: E731
    step = jax.jit(step) if compiled else step
    state = make()
    skipped = step(state, NANS)
    assert_same(skipped.params, PARAMS)
    assert_same(skipped.opt_state.inner_state, state.opt_state.inner_state)
    assert int(skipped.step) == 0
    metrics = jaxmp.loss_scale_metrics(skipped)
    assert (int(metrics["skipped_steps"]), float(metrics["loss_scale"])) == (1, 2.0**15)


def test_value_and_grad_uses_the_scale_of_this_state():
    def loss_fn(params, x):
        half = params["w"].astype(jnp.float16) * x
        return jnp.sum(half.astype(jnp.float32)), half

    state = make()
    x = jnp.full(6, 4.0, jnp.float16)
    (_, aux), grads = state.value_and_grad(loss_fn, has_aux=True)(state.params, x)
    assert aux.dtype == jnp.float16
    assert not bool(jaxmp.all_finite(grads))
    for _ in range(3):
        (loss, _), grads = state.value_and_grad(loss_fn, has_aux=True)(state.params, x)
        state = state.apply_gradients(grads=grads, value=loss)
    (_, _), grads = state.value_and_grad(loss_fn, has_aux=True)(state.params, x)
    np.testing.assert_array_equal(grads["w"], 4.0)
    assert int(state.opt_state.loss_finite) == 1


def test_donated_steps_compile_once_in_jit_scan_and_vmap():
    step = jax.jit(lambda s, g: s.apply_gradients(grads=g, value=1.0), donate_argnums=0)
    state = make(params=jax.tree.map(jnp.copy, PARAMS))
    types = jax.tree.map(jax.typeof, state)
    for grads in (ONES, NANS, ONES):
        state = step(state, grads)
    assert jax.tree.map(jax.typeof, state) == types
    assert step._cache_size() == 1
    stacked = jax.tree.map(lambda *g: jnp.stack(g), ONES, NANS, ONES)
    scanned, _ = jax.lax.scan(
        lambda s, g: (s.apply_gradients(grads=g, value=1.0), None), make(), stacked
    )
    assert int(scanned.step) == int(state.step) == 2
    for a, b in zip(*map(jax.tree.leaves, (scanned.params, state.params)), strict=True):
        # One parameter ends at 1.7e-6, the difference of two of the size of 0.2.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    ensemble = jax.vmap(lambda p: make(params=p))(stacked)
    ensemble = jax.vmap(lambda s, g: s.apply_gradients(grads=g))(ensemble, stacked)
    assert ensemble.step.tolist() == [1, 0, 1]


def test_fields_of_a_subclass_follow_the_decision():
    state = make(cls=WithStats, batch_stats={"mean": jnp.zeros(2)}, epoch=0)
    new = {"mean": jnp.full(2, jnp.nan)}
    skipped = state.apply_gradients(grads=NANS, batch_stats=new, epoch=1)
    assert_same(skipped.batch_stats, state.batch_stats)
    assert int(skipped.epoch) == 0
    applied = state.apply_gradients(grads=ONES, batch_stats={"mean": jnp.ones(2)})
    np.testing.assert_array_equal(applied.batch_stats["mean"], 1.0)
    assert isinstance(applied, WithStats)


def test_gradients_of_another_tree_are_named():
    with pytest.raises(GradientTreeMismatch, match="no gradient"):
        make().apply_gradients(grads={"w": ONES["w"]})


def test_frozen_dicts_and_half_parameters_keep_their_kind():
    with pytest.warns(jaxmp.errors.HalfParamsWarning):
        half = make(params=FrozenDict(w=jnp.ones(3, jnp.bfloat16)))
    new = half.apply_gradients(grads=FrozenDict(w=jnp.ones(3)))
    assert isinstance(new.params, FrozenDict)
    assert new.params["w"].dtype == jnp.bfloat16


def test_fp8_metadata_is_replaced_and_never_unscaled_or_kept_from_a_skip():
    """Flax passes new scales and histories of FP8 as gradients."""
    model = nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    x = jnp.ones((16, 16))
    variables = model.init(jax.random.key(0), x)
    metadata = "_overwrite_with_gradient"

    def trained(policy, x):
        state = jaxmp.TrainState.create(
            apply_fn=model.apply, params=variables, tx=optax.sgd(0.1), policy=policy
        )
        step = state.value_and_grad(lambda v, x: jnp.mean(model.apply(v, x) ** 2))
        loss, grads = step(state.params, x)
        return state.apply_gradients(grads=grads, value=loss)

    state = trained("mixed_float16", x)
    plain = trained("float32", x)
    history = "input_amax_history"
    op = next(iter(state.params[metadata]))
    np.testing.assert_array_equal(
        state.params[metadata][op][history], plain.params[metadata][op][history]
    )
    assert float(jnp.max(state.params[metadata][op][history])) == 1.0
    skipped = trained("mixed_float16", x * jnp.nan)
    assert_same(skipped.params, variables)
    assert int(skipped.step) == 0


def test_fp8_metadata_of_two_models_is_left_to_the_optimizer():
    """The state takes apart variables at the top only."""
    model = nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    x = jnp.ones((16, 16))
    pair = {name: model.init(jax.random.key(0), x) for name in ("g", "d")}
    tx = jaxmp.overwrite_with_gradient(optax.sgd(0.1))

    def trained(params, loss_fn, x):
        state = jaxmp.TrainState.create(
            apply_fn=None, params=params, tx=tx, policy="mixed_float16"
        )
        loss, grads = state.value_and_grad(loss_fn)(state.params, x)
        return state.apply_gradients(grads=grads, value=loss).params

    loss_fn = lambda v, x: jnp.mean(model.apply(v, x) ** 2)  # noqa: E731
    of_pair = lambda v, x: loss_fn(v["g"], x) + loss_fn(v["d"], x)  # noqa: E731
    alone = trained(pair["g"], loss_fn, x)
    assert_same(trained(pair, of_pair, x), {"g": alone, "d": alone})
    assert_same(trained(pair, of_pair, x * jnp.nan), pair)


# Round trips


def trained(policy="mixed_float16", **kwargs):
    state = make(policy, **kwargs)
    for grads in (ONES, NANS, ONES):
        state = state.apply_gradients(grads=grads, value=1.0)
    return state


@pytest.mark.parametrize(
    "policy", ["mixed_float16", "mixed_bfloat16", "float32,matmul=tf32"]
)
def test_msgpack_keeps_every_bit_and_the_policy(policy):
    state = trained(policy)
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(make(policy), saved)
    assert_same(restored, state.replace(tx=restored.tx))
    next_step = functools.partial(jaxmp.TrainState.apply_gradients, grads=ONES)
    assert_same(next_step(restored).params, next_step(state).params)
    assert flax.serialization.msgpack_restore(saved)["policy"] == str(state.policy)


def test_pickle_of_the_arrays():
    state = trained().replace(tx=None)
    assert_same(pickle.loads(pickle.dumps(state)), state)


def test_another_policy_names_both_and_the_repair():
    saved = flax.serialization.to_bytes(trained("mixed_float16"))
    with pytest.raises(CheckpointPolicyMismatch) as error:
        flax.serialization.from_bytes(make("mixed_bfloat16"), saved)
    for word in ("p=full,c=f16,o=full", "p=full,c=bf16,o=full", "convert=True"):
        assert word in str(error.value)
    with pytest.raises(CheckpointPolicyMismatch):
        restore(make("mixed_bfloat16"), flax.serialization.msgpack_restore(saved))


@pytest.mark.parametrize("serialize", [False, True])
def test_convert_takes_the_arrays_and_starts_the_scale_anew(serialize):
    state = trained("mixed_float16")
    saved = flax.serialization.to_state_dict(state)
    if serialize:
        saved = flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))
    other = restore(make("mixed_bfloat16"), saved, convert=True)
    assert other.policy == jaxmp.get_policy("mixed_bfloat16")
    assert_same(other.params, state.params)
    assert_same(other.opt_state.inner_state, state.opt_state.inner_state)
    assert float(jaxmp.get_loss_scale(other)) == 1.0
    assert int(other.step) == 2
    assert int(other.opt_state.skipped_steps) == 1
    back = restore(
        make("mixed_float16"), flax.serialization.to_state_dict(other), convert=True
    )
    assert float(jaxmp.get_loss_scale(back)) == 2.0**16


@pytest.mark.filterwarnings("ignore::jaxmp.errors.HalfParamsWarning")
def test_convert_casts_parameters_and_moments_to_the_new_policy():
    state = trained("mixed_float16")
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    fresh = make("bf16-true", params=half)
    other = restore(fresh, flax.serialization.to_state_dict(state), convert=True)
    assert jax.tree.map(jax.typeof, other.params) == jax.tree.map(jax.typeof, half)
    assert [x.dtype for x in jax.tree.leaves(other.opt_state)] == [
        x.dtype for x in jax.tree.leaves(fresh.opt_state)
    ]
    other.apply_gradients(grads=ONES)


def test_a_subclass_saves_its_fields_and_policy():
    fields = {"batch_stats": {"mean": jnp.ones(2)}, "epoch": 3}
    state = make(cls=WithStats, **fields)
    saved = flax.serialization.to_bytes(state)
    empty = make(cls=WithStats, batch_stats={"mean": jnp.zeros(2)}, epoch=0)
    restored = flax.serialization.from_bytes(empty, saved)
    np.testing.assert_array_equal(restored.batch_stats["mean"], 1.0)
    assert restored.epoch == 3
    other = make("float32", cls=WithStats, batch_stats={"mean": jnp.zeros(2)})
    with pytest.raises(CheckpointPolicyMismatch):
        flax.serialization.from_bytes(other, saved)
    with pytest.raises(InvalidCheckpoint) as error:
        flax.serialization.from_bytes(make(), saved)
    assert "['batch_stats', 'epoch'] are on one side only" in str(error.value)


@pytest.mark.parametrize("saved", [{}, {"params": 1}, None, "text", 3])
def test_what_names_no_policy_is_no_checkpoint(saved):
    with pytest.raises(InvalidCheckpoint, match="names no policy"):
        restore(make(), saved)


def test_a_checkpoint_of_flax_train_state_says_how_to_save_one():
    flax_state = train_state.TrainState.create(
        apply_fn=None, params=PARAMS, tx=optax.adam(0.1)
    )
    with pytest.raises(InvalidCheckpoint) as error:
        restore(make(), flax.serialization.to_state_dict(flax_state))
    assert "['opt_state', 'params', 'step']" in str(error.value)
    assert "'policy': str(policy)" in str(error.value)
