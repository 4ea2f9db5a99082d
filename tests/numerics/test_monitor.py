"""The monitored run is the unmonitored one, bit by bit; what is kept is right."""

import copy
import functools
import pickle
import warnings

import flax.linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmp
from jaxmp._transformations import composition as _composition
from jaxmp.errors import (
    LossScaleCollapsed,
    MissingParams,
    MissingState,
    NumericsError,
)
from jaxmp.numerics import get_statistics, monitor, statistics
from jaxmp.optimizers import accumulate, cast_state, ema, master_weights
from jaxmp.optimizers import stochastic_rounding as rounding

STEPS, EVERY, BAD_STEPS = 7, 3, (1, 4)  # counted from 0; 2 and 5 are measured
adam = functools.partial(optax.adamw, 0.1)


def scaled(inner):
    return jaxmp.loss_scaling(inner, "mixed_float16")


def clipped(inner):
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


# Each takes `watch`: `monitor` or, for the run to compare with, nothing.
PLACES = {
    "alone": lambda watch: watch(adam()),
    "around loss_scaling": lambda watch: watch(scaled(clipped(adam()))),
    "inside loss_scaling": lambda watch: scaled(watch(clipped(adam()))),
    "in a chain": lambda watch: scaled(clipped(watch(adam()))),
    "around and inside": lambda watch: watch(scaled(clipped(watch(adam())))),
    "around master_weights": lambda watch: watch(scaled(master_weights(adam()))),
    "around split masters": lambda watch: watch(
        scaled(master_weights(adam(), split=True))
    ),
    "inside master_weights": lambda watch: scaled(master_weights(watch(adam()))),
    "around accumulate": lambda watch: watch(scaled(accumulate(adam(), 2))),
    "beside accumulate": lambda watch: scaled(watch(accumulate(adam(), 2))),
    "inside accumulate": lambda watch: scaled(accumulate(watch(adam()), 2)),
    "around MultiSteps": lambda watch: watch(scaled(optax.MultiSteps(adam(), 2))),
    "inside MultiSteps": lambda watch: scaled(optax.MultiSteps(watch(adam()), 2)),
    "around masked": lambda watch: watch(scaled(optax.masked(adam(), MASK))),
    "inside masked": lambda watch: scaled(optax.masked(watch(adam()), MASK)),
    "inside partition": lambda watch: scaled(
        optax.partition({"a": watch(adam()), "b": optax.sgd(0.1)}, LABELS)
    ),
    "around cast_state": lambda watch: watch(scaled(cast_state(adam(), "bfloat16"))),
    "around rounding": lambda watch: watch(scaled(rounding(adam(), seed=0))),
    "around ema": lambda watch: watch(scaled(optax.chain(adam(), ema(0.9)))),
    "around schedule_free": lambda watch: watch(
        scaled(optax.contrib.schedule_free_sgd(0.1))
    ),
    "inject_hyperparams": lambda watch: watch(
        scaled(optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0, 9)))
    ),
}
MASK = {"dense": {"bias": False, "kernel": True}, "scale": True}
LABELS = {"dense": {"bias": "a", "kernel": "b"}, "scale": "a"}
BEHIND_A_CLIP = {"in a chain", "around and inside", "inside MultiSteps"}
HALF_PARAMS = {"around master_weights", "around split masters", "around rounding"}
HALF_PARAMS |= {"inside master_weights"}


def params_of(dtype):
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((4, 6)), rng.standard_normal(6)
    dense = {"bias": jnp.asarray(bias, dtype), "kernel": jnp.asarray(kernel, dtype)}
    return {"dense": dense, "scale": jnp.asarray(-0.0, dtype)}


def gradients(params, step):
    """Gradients of one step, as float16; one element is infinite on bad steps."""
    rng = np.random.default_rng(step)

    def one(p):
        return jnp.asarray(rng.standard_normal(p.shape) * 1e-3, jnp.float16)

    grads = jax.tree.map(one, params)
    if step in BAD_STEPS:
        bias = grads["dense"]["bias"]
        grads["dense"]["bias"] = bias.at[step].set(jnp.inf).at[0].set(jnp.nan)
    return grads


@functools.cache
def run(place, watched):
    """Returns the parameters and states after each step, and the number of traces."""
    watch = functools.partial(monitor, every=EVERY) if watched else lambda tx: tx
    tx = PLACES[place](watch)
    params = params_of("bfloat16" if place in HALF_PARAMS else "float32")
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        traces.append(1)
        value = jnp.float32(1)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    history = [jax.tree.map(np.array, (params, state))]
    for i in range(STEPS):
        params, state = step(params, state, gradients(params, i))
        history.append(jax.tree.map(np.array, (params, state)))
    return history, len(traces)


def assert_same(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == w.dtype
        assert np.asarray(a).tobytes() == np.asarray(w).tobytes()


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-12)


def without_monitors(state):
    """A state as it would be without the monitors in it."""

    def is_monitor(node):
        return getattr(node, "transformation", None) == "monitor"

    def unwrap(node):
        return without_monitors(node.inner_state) if is_monitor(node) else node

    return jax.tree.map(unwrap, state, is_leaf=is_monitor)


every_place = pytest.mark.parametrize("place", PLACES)


# With LLVM's optimisation, which `run` then shares with the tests below.
@pytest.mark.optimised
@every_place
def test_parameters_and_state_are_bit_identical_to_the_unmonitored_run(place):
    watched, _ = run(place, watched=True)
    plain, _ = run(place, watched=False)
    for (params, state), wanted in zip(watched, plain, strict=True):
        found = (params, without_monitors(state))
        if place in BEHIND_A_CLIP:
            # What it looks at is written to memory, and XLA's kernels are others.
            jax.tree.map(close, found, wanted)
        else:
            assert_same(found, wanted)


@every_place
def test_one_trace_and_a_state_of_constant_strong_dtypes(place):
    history, traces = run(place, watched=True)
    assert traces == 1
    types = [jax.tree.map(jax.typeof, state) for _, state in history]
    assert all(t == types[0] for t in types)


@every_place
def test_the_record_of_a_skipped_step_outlives_it(place):
    history, _ = run(place, watched=True)
    _, state = history[-1]
    found = get_statistics(state)
    sees_them = place not in (
        # Zeros in their place; means of finite micro-batches; another leaf.
        *("in a chain", "beside accumulate", "inside accumulate"),
        *("inside MultiSteps", "inside masked"),
    )
    if sees_them:
        assert found.nonfinite_step == BAD_STEPS[-1] + 1
        counts = {path: int(n) for path, n in found.nonfinite.items() if n}
        assert counts == {"dense/bias": 2}


def test_a_global_norm_hides_which_leaf_was_bad():
    _, state = run("in a chain", watched=True)[0][-1]
    assert all(n > 0 for n in get_statistics(state).nonfinite.values())


@pytest.mark.parametrize("place", ["around loss_scaling", "alone"])
def test_what_is_kept_is_the_measured_step(place):
    history, _ = run(place, watched=True)
    for steps, (_, state) in enumerate(history):
        found = get_statistics(state)
        measured = steps // EVERY * EVERY
        assert found.step == measured
        if not measured:
            assert all(not np.any(x) for x in jax.tree.leaves(found.gradients))
            continue
        before, after = history[measured - 1][0], history[measured][0]
        grads = gradients(before, measured - 1)
        assert_statistics(found.gradients, statistics(grads, "float16"))
        assert_statistics(found.params, statistics(before, "float16"))
        moves = statistics(jax.tree.map(np.subtract, after, before))
        for path, stats in found.updates.items():
            np.testing.assert_allclose(stats.mean, moves[path].mean, rtol=1e-4)
            weight = found.params[path].mean
            ratio = stats.mean / weight if weight else 0
            np.testing.assert_allclose(found.update_ratios[path], ratio, rtol=1e-6)


def assert_statistics(found, wanted):
    assert set(found) == set(wanted)
    for path, stats in wanted.items():
        for name, value in stats._asdict().items():
            np.testing.assert_allclose(
                getattr(found[path], name), value, rtol=1e-6, err_msg=name
            )


# Updates lost to rounding


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_lost_updates_are_those_that_apply_updates_loses(dtype):
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.standard_normal(4096), dtype)}
    size = float(jnp.finfo(dtype).eps) / 2
    grads = {"w": jnp.asarray(rng.standard_normal(4096) * size, jnp.float32)}
    grads["w"] = grads["w"].at[:100].set(0)
    tx = monitor(optax.sgd(1.0), every=1)

    @jax.jit
    def step(params, state):
        return tx.update(grads, state, params)

    updates, state = step(params, tx.init(params))
    moved = np.asarray(optax.apply_updates(params, updates)["w"])
    still = (moved == np.asarray(params["w"])) & (np.asarray(updates["w"]) != 0)
    assert 500 < still.sum() < 3500
    assert get_statistics(state).lost_updates["w"] == still.sum()


def test_updates_lost_in_bfloat16_are_seen_and_master_weights_lose_none():
    params = {"w": jnp.ones(8, jnp.bfloat16)}
    grads = {"w": jnp.ones(8)}
    for wrap, lost in ((lambda tx: tx, 8), (master_weights, 0)):
        tx = monitor(wrap(optax.sgd(1e-3)), every=1)
        _, state = tx.update(grads, tx.init(params), params)
        assert get_statistics(state).lost_updates["w"] == lost


# Collapse


def collapsed(tx, params, grads):
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(grads, state, params)
    with pytest.raises(LossScaleCollapsed) as caught:
        jaxmp.raise_if_collapsed(state, max_consecutive_skips=3)
    return str(caught.value)


@pytest.mark.parametrize("place", ["around loss_scaling", "inside loss_scaling"])
def test_a_collapse_names_the_leaves_worst_first(place):
    params = params_of("float32")
    grads = jax.tree.map(jnp.ones_like, params)
    grads["dense"]["kernel"] = grads["dense"]["kernel"].at[1].set(jnp.inf)
    grads["scale"] = jnp.float32(jnp.nan)
    message = collapsed(
        PLACES[place](functools.partial(monitor, every=2)), params, grads
    )
    assert message.endswith(
        "Non-finite gradients in the last skipped step: dense/kernel (6), scale (1)."
    )


def test_a_collapse_of_many_leaves_names_ten():
    params = {f"w{i}": jnp.ones(2) for i in range(13)}
    grads = jax.tree.map(lambda p: p * jnp.inf, params)
    message = collapsed(monitor(scaled(adam()), every=9), params, grads)
    assert message.count("(2)") == 10
    assert message.endswith("and 3 more leaves.")


def test_a_collapse_without_a_monitor_names_none():
    params = {"w": jnp.ones(2)}
    message = collapsed(scaled(adam()), params, {"w": jnp.full(2, jnp.inf)})
    assert "last skipped step" not in message


def test_a_collapse_of_an_ensemble_names_the_leaves_of_its_worst_member():
    tx = monitor(scaled(optax.sgd(0.1)), every=2)
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 4))}
    grads = {"a": params["a"].at[0].set(jnp.inf), "b": params["b"].at[2].set(jnp.nan)}
    state = jax.vmap(tx.init)(params)
    for i in range(3):
        now = grads if i else {**grads, "a": params["a"]}
        _, state = jax.vmap(tx.update)(now, state, params)
    with pytest.raises(LossScaleCollapsed, match=r"member 2.*: b \(4\)\.$"):
        jaxmp.raise_if_collapsed(state, max_consecutive_skips=3)
    assert get_statistics(state).gradients["a"].amax.shape == (3,)
    assert get_statistics(state).gradients["a"].exponents.shape[0] == 3


# Where states travel


def through_msgpack(tx, state):
    fresh = tx.init(params_of("float32"))
    return flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))


TRIPS = {
    "pickle": lambda tx, state: pickle.loads(pickle.dumps(state)),
    "deepcopy": lambda tx, state: copy.deepcopy(state),
    "msgpack": through_msgpack,
    "jit": lambda tx, state: jax.jit(lambda s: s)(state),
}


@pytest.mark.parametrize("trip", TRIPS)
def test_a_round_trip_keeps_every_bit_and_the_names(trip):
    tx = PLACES["around loss_scaling"](functools.partial(monitor, every=EVERY))
    _, state = run("around loss_scaling", watched=True)[0][-1]
    restored = TRIPS[trip](tx, state)
    assert_same(restored, state)
    assert get_statistics(restored).nonfinite.keys() == {
        "dense/bias",
        "dense/kernel",
        "scale",
    }


def test_optax_finds_fields_by_name():
    _, state = run("around loss_scaling", watched=True)[0][-1]
    assert optax.tree_utils.tree_get(state, "loss_scale") == 2.0**14
    assert optax.tree_utils.tree_get(state, "nonfinite_step") == 5
    assert optax.tree_utils.tree_get(state, "measured").step == 6


def test_in_a_train_state_and_through_a_checkpoint(tmp_path):
    from jaxmp.training import Checkpoints

    model = flax.linen.Dense(3)
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]

    def fresh():
        return jaxmp.TrainState.create(
            apply_fn=model.apply,
            params=params,
            tx=monitor(scaled(adam()), every=2),
            policy="mixed_float16",
        )

    @jax.jit
    def step(state, factor):
        def loss_fn(params):
            return jnp.mean(state.apply_fn({"params": params}, x)) * factor

        loss, grads = state.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, value=loss)

    state = fresh()
    for factor in (1.0, 1.0, jnp.inf):
        state = step(state, factor)
    assert jaxmp.get_loss_scale(state) == 2.0**15
    assert int(state.step) == 2
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(3, state, policy="mixed_float16")
        restored = checkpoints.restore(fresh(), policy="mixed_float16")
    assert_same(restored.opt_state, state.opt_state)
    found = get_statistics(restored)
    assert (int(found.step), int(found.nonfinite_step)) == (2, 3)
    assert {k: int(n) for k, n in found.nonfinite.items()} == {"bias": 3, "kernel": 12}


def test_in_an_nnx_optimizer():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, monitor(scaled(adam()), every=2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, factor):
        def loss_fn(model):
            return jnp.mean(model(jnp.ones((2, 4)))) * factor

        value_and_grad = jaxmp.value_and_grad(loss_fn, transform=nnx.value_and_grad)
        loss, grads = value_and_grad(model, loss_scale=optimizer)
        optimizer.update(model, grads, value=loss)

    for factor in (1.0, 1.0, jnp.nan):
        step(model, optimizer, factor)
    found = get_statistics(optimizer)
    assert {k: int(n) for k, n in found.nonfinite.items()} == {"bias": 3, "kernel": 12}
    assert found.gradients["kernel"].size == 12
    with pytest.raises(LossScaleCollapsed, match=r"kernel \(12\), bias \(3\)"):
        jaxmp.raise_if_collapsed(optimizer, max_consecutive_skips=1)


@pytest.mark.devices(8)
def test_sharded_gradients_are_counted_whole():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.ones(16), spec)}
    grads = {"w": jax.device_put(jnp.ones(16).at[3].set(jnp.inf), spec)}
    tx = monitor(scaled(optax.sgd(0.1)), every=1)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    found = get_statistics(state)
    assert (int(found.nonfinite["w"]), int(found.gradients["w"].size)) == (1, 16)


# Odd trees


def test_trees_with_integers_missing_gradients_and_nothing_at_all():
    params = {"w": jnp.ones(2), "n": jnp.int32(3), "none": None}
    grads = {"w": jnp.ones(2), "n": np.zeros((), jax.dtypes.float0), "none": None}
    tx = monitor(
        optax.masked(optax.sgd(0.1), {"w": True, "n": False, "none": True}), every=1
    )
    _, state = tx.update(grads, tx.init(params), params)
    assert list(get_statistics(state).gradients) == ["w"]

    tx = monitor(optax.identity(), every=1)
    for params in ({}, {"n": jnp.int32(3)}):
        updates, state = tx.update(params, tx.init(params), params)
        assert updates == params
        assert get_statistics(state).gradients == {}
        assert state.nonfinite_leaves() == {}

    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = tx.update({"a": jnp.ones(2), "b": None}, tx.init(params), params)
    found = get_statistics(state)
    assert (int(found.gradients["b"].size), int(found.params["b"].size)) == (0, 3)


def test_complex_and_float64_parameters():
    with jax.enable_x64(True):
        params = {"c": jnp.ones(3, complex), "d": jnp.ones(3, float)}
        grads = {"c": jnp.full(3, 1j * jnp.nan), "d": jnp.full(3, 1e-300)}
        tx = monitor(optax.sgd(1.0), every=1)
        _, state = tx.update(grads, tx.init(params), params)
        found = get_statistics(state)
    assert found.nonfinite["c"] == 3
    assert found.gradients["d"].underflows == found.lost_updates["d"] == 3
    assert found.gradients["d"].amax.dtype == jnp.float32


def test_extra_arguments_reach_what_is_watched():
    seen = {}

    def update(grads, state, params=None, **extra_args):
        seen.update(extra_args)
        return grads, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = scaled(monitor(inner, every=2))
    tx.update(
        {"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)}, value=1
    )
    assert set(seen) == {"value", "grads_finite"}


def test_a_line_search_inside():
    tx = monitor(optax.lbfgs(), every=2)
    params = jnp.array([3.0, -2.0])

    def objective(x):
        return jnp.sum(x**2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    assert float(objective(params)) < 1e-6
    assert get_statistics(state).step == 4


def test_strict_promotion_and_no_leaks(strict):
    tx = monitor(optax.identity(), every=1)
    params = {"w": jnp.ones(3, jnp.bfloat16), "s": jnp.float32(1)}
    grads = jax.tree.map(jnp.ones_like, params)
    jax.jit(tx.update)(grads, tx.init(params), params)


# Mistakes


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(NumericsError, match=r"monitor\(tx, every=100\)"):
        monitor(adam(), every=every)


def test_the_dtype_is_read_at_once():
    with pytest.raises(NumericsError, match="int8"):
        monitor(adam(), every=2, dtype="int8")


def test_parameters_are_needed():
    tx = monitor(optax.sgd(0.1), every=2)
    with pytest.raises(MissingParams, match=r"monitor\(\) was updated without"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))


def test_a_state_without_a_monitor():
    with pytest.raises(MissingState, match=r"monitor\(loss_scaling"):
        get_statistics(adam().init(jnp.ones(2)))


# Cost


def test_no_copy_of_the_update_outside_of_the_branch():
    """The step around the branch has the kernels of the unmonitored step."""
    params = {f"w{i}": jnp.ones((64, 128)) for i in range(2)}

    def arrays_touched(tx):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        hlo = step.lower(params, state, params).compile().as_text()
        entry = hlo[hlo.index("\nENTRY") :]
        kernels = [line for line in entry.splitlines() if " fusion(" in line]
        return sum(line.count("f32[64,128]") for line in kernels)

    tx = scaled(clipped(adam()))
    assert arrays_touched(monitor(tx, every=9)) <= arrays_touched(tx)


def test_names_of_states_are_found():
    tx = monitor(scaled(adam()), every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _composition.names(tx.init(jnp.ones(2))) == ["monitor", "loss_scaling"]
