"""`loss_scaling`: what is checked, what is skipped, and what it costs."""

import collections
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.errors import GradientTreeMismatch, HalfParamsWarning

PARAMS = {"b": jnp.array([0.5, -0.0, 2.0]), "w": jnp.linspace(-1.0, 1.0, 6)}


def scheduled_adam():
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.1, 0.0, 9))
    )


def f16_scaling(inner, **options):
    return jaxmp.loss_scaling(inner, "mixed_float16", **options)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def poisoned(value, leaf="w", index=0):
    """Gradients of 1 with one bad element in one leaf."""
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    return {**grads, leaf: grads[leaf].at[index].set(value)}


def stepper(tx):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


# Skipping


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("leaf", ["b", "w"])
def test_one_bad_element_in_one_leaf_moves_nothing(bad, leaf):
    tx = f16_scaling(scheduled_adam())
    step = stepper(tx)
    params, state = step(PARAMS, tx.init(PARAMS), poisoned(1.0))
    skipped, after = step(params, state, poisoned(bad, leaf))
    assert bits(skipped) == bits(params)
    assert bits(after.inner_state) == bits(state.inner_state)
    assert float(after.loss_scale) == 2.0**15
    assert not after.grads_finite
    counts = (after.applied_steps, after.skipped_steps, after.consecutive_skips)
    assert [int(x) for x in counts] == [1, 1, 1]


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_a_skipped_update_is_a_select_not_a_product_with_zero(bad):
    tx = f16_scaling(optax.sgd(0.1))
    updates, _ = jax.jit(tx.update)(poisoned(bad), tx.init(PARAMS), PARAMS)
    for update in jax.tree.leaves(updates):
        assert (np.asarray(update) == 0).all()
        assert np.signbit(update).all()  # -0.0, which leaves every parameter as it is


ODD = jnp.array([-0.0, 0.0, jnp.nan, jnp.inf, -jnp.inf, 1e-38, 3e38])


# Subnormals are kept by LLVM's optimisation, which drops the addition of -0.0.
@pytest.mark.optimised
def test_a_skip_keeps_negative_zeros_nans_and_infinities_in_parameters():
    tx = f16_scaling(optax.adam(0.1))
    params, _ = stepper(tx)(ODD, tx.init(ODD), jnp.full_like(ODD, jnp.nan))
    assert jnp.isnan(params).tolist() == jnp.isnan(ODD).tolist()
    # An addition makes NaNs canonical on NVIDIA's GPUs.
    numbers = ~np.isnan(ODD)
    assert bits(np.asarray(params)[numbers]) == bits(np.asarray(ODD)[numbers])
    if jax.default_backend() == "cpu":
        assert bits(params) == bits(ODD)


def test_a_select_behind_the_addition_keeps_the_payload_of_a_nan():
    tx = f16_scaling(optax.adam(0.1))

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        moved = optax.apply_updates(params, updates)
        return jaxmp.select_applied(state, moved, params)

    odd = jnp.append(ODD, jnp.asarray(np.uint32(0x7FC12345).view(np.float32)))
    assert bits(step(odd, tx.init(odd), jnp.full_like(odd, jnp.nan))) == bits(odd)


def test_complex_and_integer_parameters_survive_a_skip():
    params = {"z": jnp.array([1 - 2j, complex(-0.0, 0.0)]), "n": jnp.int32(3)}
    grads = {"z": params["z"] * jnp.nan, "n": jnp.int32(0)}
    tx = f16_scaling(optax.sgd(0.1))
    step = stepper(tx)
    skipped, state = step(params, tx.init(params), grads)
    assert bits(skipped) == bits(params)
    assert [x.dtype for x in jax.tree.leaves(skipped)] == [jnp.int32, jnp.complex64]
    moved, state = step(params, state, {**grads, "z": params["z"]})
    assert int(state.applied_steps) == 1
    np.testing.assert_allclose(moved["z"][0], (1 - 2j) * 0.9, rtol=1e-6)


def test_key_in_the_inner_state_is_that_of_the_last_applied_step():
    tx = f16_scaling(optax.add_noise(0.1, 0.5, jax.random.key(0)))
    grads = jnp.ones(3)
    _, state = tx.update(grads, tx.init(grads), grads)
    key = jax.random.key_data(state.inner_state.rng_key)
    _, state = tx.update(grads * jnp.nan, state, grads)
    assert bits(jax.random.key_data(state.inner_state.rng_key)) == bits(key)


# The finite check


def test_finite_gradients_whose_sum_overflows_are_applied():
    grads = jnp.ones(70_000, jnp.float16)
    assert not np.isfinite(jnp.sum(grads))
    tx = f16_scaling(optax.sgd(1.0))
    _, state = tx.update(grads, tx.init(grads.astype(jnp.float32)))
    assert state.grads_finite
    assert bool(jaxmp.all_finite(grads))


def test_finite_gradients_whose_norm_overflows_float32_are_applied():
    grads = jnp.full(10, 3e38)
    tx = f16_scaling(optax.sgd(1e-38))
    _, state = tx.update(grads, tx.init(grads), grads)
    assert state.grads_finite
    assert bool(jaxmp.all_finite(grads))


def test_largest_finite_values_of_every_dtype_are_finite(strict):
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        largest = jnp.full(3, jnp.finfo(dtype).max, dtype)
        assert bool(jaxmp.all_finite({"a": largest, "b": -largest}))
        assert not bool(jaxmp.all_finite({"a": largest, "b": largest * 2}))


def test_a_bad_element_is_found_in_complex_scalars_and_empty_leaves(strict):
    good = {"z": jnp.ones(2, jnp.complex64), "e": jnp.ones((0, 3)), "s": jnp.ones(())}
    assert bool(jaxmp.all_finite(good))
    for bad in (complex(0, np.inf), complex(np.nan, 0)):
        assert not bool(jaxmp.all_finite({**good, "z": jnp.complex64(bad)}))


# Clipping and order


def test_float16_gradients_are_clipped_by_a_float32_norm():
    grads = jnp.full(4, 300.0, jnp.float16)
    tx = f16_scaling(optax.clip_by_global_norm(1.0))
    updates, _ = tx.update(grads, tx.init(jnp.zeros(4)))
    assert updates.dtype == jnp.float32
    np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0**8, 2.0**15, 2.0**24])
def test_clipping_sees_unscaled_gradients_whatever_the_scale(scale):
    def loss_fn(w):
        return jnp.sum(jnp.sin(w)) * 1e-3

    w = jnp.linspace(0.1, 1.0, 5)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    expected, _ = chain.update(jax.grad(loss_fn)(w), chain.init(w))
    for grads_are_scaled in (False, True):
        tx = jaxmp.loss_scaling(chain, scale, grads_are_scaled=grads_are_scaled)
        state = tx.init(w)
        if grads_are_scaled:
            grads = jax.grad(lambda w: jaxmp.scale_loss(loss_fn(w), state))(w)  # noqa: B023
        else:
            grads = jaxmp.grad(loss_fn)(w, loss_scale=state)
        updates, _ = tx.update(grads, state, w)
        assert bits(updates) == bits(expected)


# The scale


def test_a_scale_that_only_grows_stops_at_max_scale_and_stays_exact():
    tx = f16_scaling(optax.identity(), growth_interval=1)

    def step(state, _):
        return tx.update(jnp.float32(1e-8), state)[1], state.loss_scale

    state, scales = jax.jit(lambda s: jax.lax.scan(step, s, length=1_000_000))(
        tx.init(jnp.zeros(()))
    )
    assert float(state.loss_scale) == 2.0**24
    assert np.unique(scales).tolist() == [2.0**n for n in range(16, 25)]
    grads = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    scale = jaxmp.StaticLossScale(2.0**24)
    assert bits(scale.unscale(scale.scale(grads))) == bits(grads)


def test_a_loss_that_is_always_nan_clamps_the_scale_and_says_why():
    tx = f16_scaling(optax.adam(0.1))
    w = jnp.ones(3)

    @jax.jit
    def run(state):
        def step(state, _):
            loss, grads = jaxmp.value_and_grad(lambda w: jnp.sum(w) * jnp.nan)(
                w, loss_scale=state
            )
            return tx.update(grads, state, w, value=loss)[1], None

        return jax.lax.scan(step, state, length=300)[0]

    state = run(tx.init(w))
    assert float(state.loss_scale) == 1.0
    assert int(state.consecutive_skips) == int(state.skipped_steps) == 300
    with pytest.raises(jaxmp.errors.LossScaleCollapsed) as error:
        jaxmp.raise_if_collapsed(state, max_consecutive_skips=50)
    assert "last 300 steps" in str(error.value)
    assert "the forward pass already overflowed" in str(error.value)


# Accumulation


@pytest.mark.parametrize("every_k", [2, 4])
def test_a_scale_that_moves_within_a_window_of_multi_steps_does_not_show(every_k):
    """Gradients are unscaled before they are added, each by the scale it was under."""

    def loss_fn(w, x):
        half = (w.astype(jnp.float16) * x.astype(jnp.float16)).astype(jnp.float32)
        return jnp.mean(half**2)

    xs = np.random.default_rng(0).normal(size=(4 * every_k, 8)).astype(np.float32)
    w = jnp.linspace(0.5, 1.5, 8)
    multi = optax.MultiSteps(optax.sgd(0.1), every_k)
    tx = f16_scaling(multi, growth_interval=1, init_scale=2.0, max_scale=2.0**12)

    @jax.jit
    def step(w, state, x):
        loss, grads = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=state)
        updates, state = tx.update(grads, state, w, value=loss)
        return optax.apply_updates(w, updates), state, loss

    state, reference, scales = tx.init(w), w, set()
    for window in np.split(xs, 4):
        expected = np.mean([jax.grad(loss_fn)(reference, x) for x in window], axis=0)
        reference = reference - 0.1 * expected
        for x in window:
            scales.add(float(state.loss_scale))
            w, state, _ = step(w, state, x)
        # A half-precision backward under another scale rounds subnormals differently.
        np.testing.assert_allclose(w, reference, rtol=1e-4)
    assert len(scales) > every_k


def test_a_bad_micro_batch_of_multi_steps_is_dropped_from_its_window():
    tx = f16_scaling(optax.MultiSteps(optax.sgd(1.0), 2))
    step = stepper(tx)
    w, state = step(jnp.float32(10), tx.init(jnp.float32(10)), jnp.float32(1))
    w, state = step(w, state, jnp.float32(jnp.nan))
    assert float(w) == 10.0
    w, state = step(w, state, jnp.float32(3))
    assert float(w) == 8.0
    assert int(state.inner_state.gradient_step) == 1


# Types


def test_a_hundred_steps_compile_once_with_constant_dtypes():
    tx = f16_scaling(scheduled_adam(), growth_interval=7, init_scale=2.0**8)

    def step(params, state, is_bad):
        def loss_fn(params):
            w = params["w"].astype(jnp.float16)
            return jnp.sum(w * w).astype(jnp.float32) * jnp.where(is_bad, jnp.inf, 1)

        loss, grads = jaxmp.value_and_grad(loss_fn)(params, loss_scale=state)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    types = jax.tree.map(jax.typeof, (params, state))
    for i in range(100):
        params, state = step(params, state, jnp.bool_(i % 10 == 9))
    assert step._cache_size() == 1
    assert jax.tree.map(jax.typeof, (params, state)) == types
    assert int(state.skipped_steps) == 10
    assert not any(x.weak_type for x in jax.tree.leaves(types))


@pytest.mark.parametrize("param_dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("grad_dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.filterwarnings("ignore::jaxmp.errors.HalfParamsWarning")
def test_parameters_keep_their_dtype_under_gradients_of_another(
    param_dtype, grad_dtype
):
    tx = f16_scaling(optax.adamw(0.1))
    params = jnp.array([1.0, -0.0, 3.0], param_dtype)
    step = stepper(tx)
    state = tx.init(params)
    types = jax.tree.map(jax.typeof, (params, state))
    for grad in (1.0, jnp.inf, 0.5, 0.0):
        before = params
        params, state = step(params, state, jnp.full(3, grad, grad_dtype))
        assert jax.tree.map(jax.typeof, (params, state)) == types
        assert np.isfinite(params).all()
        assert (bits(params) == bits(before)) == (grad == jnp.inf)
    assert step._cache_size() == 1


def test_numpy_gradients_parameters_and_losses_are_taken():
    tx = f16_scaling(optax.adam(0.1))
    params, grads = np.ones(3, np.float32), np.ones(3, np.float16)
    updates, state = tx.update(grads, tx.init(params), params, value=np.float64(2.0))
    assert updates.dtype == jnp.float32
    assert int(state.loss_finite) == 1


def test_float64_stays_float64_and_widens_nothing_else():
    with jax.enable_x64(True):
        tx = f16_scaling(optax.adam(0.1), growth_interval=1)
        params = {"d": jnp.ones(3, jnp.float64), "f": jnp.ones(3, jnp.float32)}
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        updates, state = jax.jit(tx.update)(params, state, params, value=1.0)
        assert [updates[k].dtype for k in "df"] == [jnp.float64, jnp.float32]
        assert jax.tree.map(jax.typeof, state) == types
        assert (state.loss_scale.dtype, state.applied_steps.dtype) == ("f4", "i4")


@pytest.mark.parametrize("mode", ["mixed_float16", "mixed_bfloat16", 8.0])
@pytest.mark.parametrize("grads_are_scaled", [False, True])
def test_update_mixes_no_dtypes_and_leaks_nothing(strict, mode, grads_are_scaled):
    tx = jaxmp.loss_scaling(optax.identity(), mode, grads_are_scaled=grads_are_scaled)
    grads = {
        "half": jnp.ones(2, jnp.float16),
        "brain": jnp.ones((), jnp.bfloat16),
        "single": jnp.ones((2, 3)),
        "complex": jnp.ones(2, jnp.complex64),
        "none": None,
    }
    params = jax.tree.map(lambda g: g.astype(jnp.complex64), grads)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, params, value=jnp.float16(1))
    assert updates["half"].dtype == updates["brain"].dtype == jnp.float32
    assert int(state.applied_steps) == 2


def test_none_and_masked_leaves_pass():
    params = {"w": jnp.ones(2), "frozen": None}
    tx = f16_scaling(optax.adam(0.1))
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["frozen"] is None
    # Equinox gives None for what has no gradient, of parameters that are arrays.
    arrays = {"w": jnp.ones(2), "steps": {"n": jnp.int32(1)}}
    updates, _ = f16_scaling(optax.sgd(0.1)).update(
        {"w": jnp.ones(2), "steps": None}, state, arrays
    )
    assert updates["steps"] is None


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_parameters_without_a_float32_copy_warn_by_name(dtype):
    params = {"layer": {"kernel": jnp.ones(2, dtype)}, "bias": jnp.ones(2)}
    with pytest.warns(HalfParamsWarning) as caught:
        f16_scaling(optax.adam(0.1)).init(params)
    message = str(caught[0].message)
    assert "'layer/kernel'" in message
    assert "1 parameters" in message
    assert "master_weights(optimizer)" in message
    assert caught[0].filename == __file__


def test_float32_parameters_and_master_weights_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f16_scaling(optax.adam(0.1)).init(PARAMS)
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        f16_scaling(jaxmp.master_weights(optax.adam(0.1))).init(half)


# Modes


@pytest.mark.parametrize("mode", ["mixed_float16", "mixed_bfloat16", "float32", 8.0])
def test_every_mode_skips(mode):
    tx = jaxmp.loss_scaling(optax.adam(0.1), mode)
    params, state = stepper(tx)(PARAMS, tx.init(PARAMS), poisoned(jnp.nan))
    assert bits(params) == bits(PARAMS)
    assert int(state.skipped_steps) == 1


@pytest.mark.parametrize("mode", ["mixed_float16", "mixed_bfloat16", 8.0])
def test_skip_nonfinite_false_applies_everything(mode):
    tx = jaxmp.loss_scaling(optax.sgd(0.1), mode, skip_nonfinite=False)
    params, state = stepper(tx)(PARAMS, tx.init(PARAMS), poisoned(jnp.inf))
    assert np.isinf(params["w"][0])
    assert (int(state.applied_steps), int(state.skipped_steps)) == (1, 0)
    expected = {"mixed_float16": 2.0**15, "mixed_bfloat16": 1.0, 8.0: 8.0}
    assert float(state.loss_scale) == expected[mode]


TUPLES = ("tuple", "get-tuple-element")


@functools.cache
def operations(mode=None, **options):
    """Counts the instructions of a compiled step; without a mode, of the bare one."""
    tx = scheduled_adam()
    if mode is not None:
        tx = jaxmp.loss_scaling(tx, mode, **options)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    args = jax.eval_shape(lambda p: (p, tx.init(p), p), params)
    text = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().as_text()
    found = re.findall(r"= \S+ ([a-z][\w-]*)\(", text)
    # GPUs hand on what one kernel computes in tuples.
    return collections.Counter(name for name in found if name not in TUPLES)


@pytest.mark.parametrize("mode", ["mixed_bfloat16", "float32", 1.0])
def test_without_skips_and_scale_it_compiles_to_the_bare_optimizer(mode):
    bare, ours = operations(), operations(mode, skip_nonfinite=False)
    # What is left are the scalars of the state: their parameters, copies and the
    # counter of applied steps. Nothing is compared, selected, branched or divided.
    scalars = {"parameter", "constant", "copy", "add", "fusion"}
    for name in ours.keys() | bare.keys():
        more = ours[name] - bare[name]
        assert 0 <= more <= 8 if name in scalars else more == 0, (name, more)
    skipping = operations("float32")
    for name in ("select", "is-finite"):
        assert ours[name] == bare[name] < skipping[name]


def test_there_is_no_branch_around_the_inner_update():
    text = str(
        jax.make_jaxpr(stepper(f16_scaling(optax.adam(0.1))))(
            PARAMS, f16_scaling(optax.adam(0.1)).init(PARAMS), PARAMS
        )
    )
    assert "cond[" not in text
    assert "while[" not in text


# Extra arguments


def test_extra_arguments_and_the_decision_reach_the_inner_transformation():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = f16_scaling(optax.chain(inner, optax.scale(-1.0)))
    for grad, finite in ((1.0, True), (jnp.inf, False)):
        grads = jnp.full(2, grad)
        tx.update(grads, tx.init(grads), value=jnp.float32(1), batch="batch")
        assert seen.pop("value") == 1.0
        assert bool(seen.pop("grads_finite")) is finite
        assert seen == {"batch": "batch"}


def test_a_transformation_that_takes_no_decision_is_given_none():
    def update(updates, state, params=None, *, value):
        return updates, value

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    tx = f16_scaling(inner)
    _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=jnp.float32(1))
    assert float(state.inner_state) == 1.0
    with pytest.raises(TypeError, match="'batch'"):
        tx.update(jnp.ones(2), state, value=jnp.float32(1), batch="refused")


def test_the_state_remembers_whether_the_loss_was_finite():
    tx = f16_scaling(optax.sgd(0.1))
    state = tx.init(jnp.ones(()))
    assert int(state.loss_finite) == -1
    for value, expected in ((1.0, 1), (jnp.inf, 0), (jnp.float16(jnp.nan), 0)):
        _, state = tx.update(jnp.ones(()), state, value=value)
        assert int(state.loss_finite) == expected
    _, state = tx.update(jnp.ones(()), state)
    assert int(state.loss_finite) == -1


def test_a_schedule_counts_applied_steps_only():
    tx = f16_scaling(optax.sgd(optax.piecewise_constant_schedule(1.0, {2: 0.0})))
    step = stepper(tx)
    w, state = jnp.float32(0), tx.init(jnp.float32(0))
    for grad in (1, jnp.nan, jnp.nan, 1, 1, 1):
        w, state = step(w, state, jnp.float32(grad))
    assert float(w) == -2.0


# Errors


@pytest.mark.parametrize(
    ("grads", "named"),
    [
        ({"w": jnp.ones(6)}, "parameter 'b' but no gradient"),
        ({**PARAMS, "extra": jnp.ones(1)}, "gradient 'extra' but no parameter"),
        ({"w": PARAMS["w"], "b": {"c": PARAMS["b"]}}, "gradient 'b/c'"),
        ([PARAMS["b"], PARAMS["w"]], "gradient '0'"),
    ],
)
def test_gradients_of_another_tree_are_named(grads, named):
    tx = f16_scaling(optax.adam(0.1))
    with pytest.raises(GradientTreeMismatch) as error:
        tx.update(grads, tx.init(PARAMS), PARAMS)
    assert named in str(error.value)
    assert "same tree" in str(error.value)


# Debugging


def step_returning(what):
    def loss_fn(w):
        return jnp.sum(jnp.sqrt(w)) * 0.0  # 0 * inf in the backward pass only

    tx = f16_scaling(optax.sgd(0.1))

    @jax.jit
    def step(w, state):
        loss, grads = jaxmp.value_and_grad(loss_fn)(w, loss_scale=state)
        updates, state = tx.update(grads, state, w, value=loss)
        new = {"params": optax.apply_updates(w, updates), "state": state}
        return {**new, "loss": loss, "grads": grads}[what], state.grads_finite

    w = jnp.zeros(2)
    return step(w, tx.init(w))


def test_jax_debug_nans_aborts_on_an_overflow_that_would_be_skipped():
    """A NaN that leaves a compiled function aborts; one that is selected away does not.

    So debug_nans and loss scaling do not go together: `grads_finite` says the same.
    """
    _, finite = step_returning("grads")
    assert not finite
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError, match="nan"):
            step_returning("grads")
        for handled in ("params", "state", "loss"):
            _, finite = step_returning(handled)
            assert not finite
