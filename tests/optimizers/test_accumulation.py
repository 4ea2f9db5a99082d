"""Accumulation of true gradients in float32, alone and under a loss scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.errors import OptimizerOptionError, TransformationOrder
from jaxmp.optimizers import accumulate, cast_state, master_weights, stochastic_rounding

NAN = float("nan")


def final(tx, params, grads, values=None, jit=True):
    """Parameters after every micro-batch, and the last state."""
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    seen = []
    for i, grad in enumerate(grads):
        extra = {} if values is None else {"value": jnp.float32(values[i])}
        grad = jax.tree.map(lambda p: jnp.full(p.shape, grad, jnp.float32), params)  # noqa: B023
        updates, state = update(grad, state, params, **extra)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


STACKS = {
    "accumulate": lambda tx, **kw: accumulate(tx, 4, **kw),
    "loss_scaling": lambda tx, **kw: jaxmp.loss_scaling(
        accumulate(tx, 4, **kw), "mixed_float16"
    ),
    "master_weights": lambda tx, **kw: jaxmp.loss_scaling(
        master_weights(accumulate(tx, 4, **kw)), "mixed_float16"
    ),
    "clip before": lambda tx, **kw: jaxmp.loss_scaling(
        optax.chain(optax.clip_by_global_norm(1e3), accumulate(tx, 4, **kw)),
        "mixed_float16",
    ),
    "masked": lambda tx, **kw: jaxmp.loss_scaling(
        optax.masked(accumulate(tx, 4, **kw), True), "mixed_float16"
    ),
    "stochastic": lambda tx, **kw: jaxmp.loss_scaling(
        stochastic_rounding(accumulate(tx, 4, **kw), seed=0), "mixed_bfloat16"
    ),
}
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)

WINDOWS = {
    "good": ([1, 3, 5, 7], 4.0),
    "second bad": ([1, NAN, 3, 5], 3.0),
    "first bad": ([NAN, 1, 3, 5], 3.0),
    "last bad": ([1, 3, 5, NAN], 3.0),
    "inf": ([1, 3, 5, float("inf")], 3.0),
    "one good": ([NAN, NAN, 3, -NAN], 3.0),
    "all bad": ([NAN, NAN, NAN, NAN], 0.0),
}


@every_stack
@pytest.mark.parametrize(("grads", "mean"), WINDOWS.values(), ids=WINDOWS)
def test_skip_micro_takes_the_mean_of_the_rest(stack, grads, mean):
    dtype = jnp.float32 if stack is not STACKS["stochastic"] else jnp.bfloat16
    params = jnp.full((2,), 16.0, dtype)
    seen, state = final(stack(optax.sgd(1.0)), params, grads)
    assert [p.tolist() for p in seen[:3]] == [[16.0, 16.0]] * 3
    assert seen[3].tolist() == [16.0 - mean] * 2
    assert optax.tree_utils.tree_get(state, "applied_windows") == int(mean > 0)
    assert optax.tree_utils.tree_get(state, "skipped_windows") == int(mean == 0)


@every_stack
@pytest.mark.parametrize("name", ["second bad", "last bad", "inf", "all bad"])
def test_skip_window_changes_nothing(stack, name):
    dtype = jnp.float32 if stack is not STACKS["stochastic"] else jnp.bfloat16
    params = jnp.full((2,), -0.0, dtype)
    tx = stack(optax.adam(1.0), on_nonfinite="skip_window")
    seen, state = final(tx, params, WINDOWS[name][0])
    assert all(jnp.signbit(p).all() for p in seen)
    assert optax.tree_utils.tree_get(state, "skipped_windows") == 1
    for moment in optax.tree_utils.tree_get(state, "mu"), state:
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(moment))


def test_many_windows_are_the_optimizer_on_the_means():
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(40,)).astype(np.float32)
    grads[[3, 9, 19, 30]] = NAN
    means = [np.nanmean(grads[i : i + 4]) for i in range(0, 40, 4)]
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lambda i: 0.1 / (1 + i))
    )
    stack = jaxmp.loss_scaling(master_weights(accumulate(tx, 4)), "mixed_float16")
    ours, state = final(stack, params, grads)
    theirs, _ = final(tx, {"w": jnp.ones(3)}, means)
    np.testing.assert_allclose(
        optax.tree_utils.tree_get(state, "master")["w"], theirs[-1]["w"], rtol=1e-6
    )
    for k in range(10):
        np.testing.assert_array_equal(
            ours[4 * k + 3]["w"], theirs[k]["w"].astype(jnp.bfloat16)
        )
    metrics = jaxmp.loss_scale_metrics(state)
    assert metrics["applied_steps"] == 36
    assert metrics["skipped_steps"] == 4
    assert metrics["applied_windows"] == 10
    assert metrics["skipped_windows"] == 0


def test_the_scale_may_change_within_a_window():
    weights = jnp.asarray([0.5, -1.5], jnp.float32)
    data = jnp.asarray(np.random.default_rng(1).normal(size=(8, 2)), jnp.float32)
    tx = jaxmp.dynamic_loss_scaling(
        accumulate(optax.sgd(0.1), 4), growth_interval=1, init_scale=2.0**4
    )

    def loss_fn(w, x):
        return (w.astype(jnp.float16) * x.astype(jnp.float16)).sum()

    state, w, scales = tx.init(weights), weights, []
    for x in data:
        loss, grads = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=state)
        scales.append(float(state.loss_scale))
        updates, state = tx.update(grads, state, w, value=loss)
        w = optax.apply_updates(w, updates)
    assert len(set(scales)) == 8
    rounded = data.astype(jnp.float16).astype(jnp.float32)
    np.testing.assert_allclose(w, weights - 0.1 * rounded.mean(0) * 2, rtol=1e-3)


def test_bad_micro_batches_back_the_scale_off():
    tx = jaxmp.loss_scaling(accumulate(optax.sgd(1.0), 4), "mixed_float16")
    _, state = final(tx, jnp.ones(2), [1, NAN, NAN, 5])
    assert jaxmp.get_loss_scale(state) == 2.0**14


def test_the_inner_optimizer_sees_the_mean_loss_of_good_micro_batches():
    seen = []

    def record(updates, state, params=None, *, value, **extra_args):
        del extra_args, params
        seen.append(float(value))
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: (), record)
    for tx in accumulate(spy, 4), jaxmp.loss_scaling(accumulate(spy, 4), "float32"):
        seen.clear()
        final(tx, jnp.ones(2), [1, 2, 3, NAN], values=[10, 20, 30, NAN], jit=False)
        assert seen[-1] == 20


def test_half_gradients_are_summed_in_float32():
    params = jnp.zeros(1, jnp.bfloat16)
    tx = accumulate(optax.sgd(1.0), 300)
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(299):
        _, state = update(jnp.ones(1, jnp.bfloat16), state, params)
    assert state.grad_sums.dtype == jnp.float32
    assert state.grad_sums.tolist() == [299.0]


def test_the_train_state_moves_at_the_end_of_a_window_that_ends_badly():
    state = jaxmp.TrainState.create(
        apply_fn=None,
        params=jnp.full(2, 16.0),
        tx=accumulate(optax.sgd(1.0), 4),
        policy="mixed_float16",
    )
    for grad in [1, 3, 5, NAN]:
        state = state.apply_gradients(grads=jnp.full(2, grad, jnp.float32))
    assert state.params.tolist() == [13.0, 13.0]


@pytest.mark.devices(8)
def test_one_flag_over_all_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    tx = jaxmp.loss_scaling(
        accumulate(optax.sgd(1.0), 2), "mixed_float16", axis_name="data"
    )
    params = jnp.zeros(1)
    spec = jax.sharding.PartitionSpec

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=spec("data"), out_specs=spec("data")
    )
    def run(grads):
        w, state = params, tx.init(params)
        w, state = jax.lax.pcast((w, state), ("data",), to="varying")
        for i in range(2):
            updates, state = tx.update(grads[0, i, None], state, w)
            w = optax.apply_updates(w, updates)
        return w

    grads = jnp.ones((8, 2)).at[3, 1].set(jnp.inf)
    assert run(grads).tolist() == [-1.0] * 8


@pytest.mark.parametrize("every_k", [0, -1, 2.0, True])
def test_every_k_is_a_count(every_k):
    message = f"every_k={every_k}.*integer of at least 1"
    with pytest.raises(OptimizerOptionError, match=message):
        accumulate(optax.sgd(1.0), every_k)


def test_on_nonfinite_is_one_of_two():
    with pytest.raises(
        OptimizerOptionError, match=r"'drop'.*'skip_micro'.*'skip_window'"
    ):
        accumulate(optax.sgd(1.0), 2, on_nonfinite="drop")


ORDERS = {
    "master_weights inside cast_state": (
        lambda: cast_state(master_weights(optax.adam(1.0)), "bfloat16"),
        r"master_weights\(\) stands inside cast_state\(\).*Swap them",
    ),
    "accumulate inside cast_state": (
        lambda: cast_state(accumulate(optax.adam(1.0), 2), "bfloat16"),
        r"accumulate\(cast_state",
    ),
    "master_weights twice": (
        lambda: master_weights(optax.chain(master_weights(optax.adam(1.0)))),
        "One float32 copy is enough",
    ),
    "stochastic_rounding inside master_weights": (
        lambda: master_weights(stochastic_rounding(optax.adam(1.0), seed=0)),
        "nothing needs to be rounded at random",
    ),
    "master_weights inside stochastic_rounding": (
        lambda: stochastic_rounding(master_weights(optax.adam(1.0)), seed=0),
        "Where a float32 copy is kept",
    ),
    "master_weights inside accumulate": (
        lambda: accumulate(master_weights(optax.adam(1.0)), 2),
        r"keep no copy.*master_weights\(accumulate",
    ),
    "stochastic_rounding inside accumulate": (
        lambda: accumulate(stochastic_rounding(optax.adam(1.0), seed=0), 2),
        r"round nothing.*stochastic_rounding\(accumulate",
    ),
    "stochastic_rounding inside cast_state": (
        lambda: cast_state(stochastic_rounding(optax.adam(1.0), seed=0), "bfloat16"),
        r"round nothing.*stochastic_rounding\(cast_state",
    ),
    "state beside accumulate": (
        lambda: jaxmp.loss_scaling(
            optax.chain(accumulate(optax.sgd(1.0), 2), optax.adam(1.0)), "float32"
        ),
        r"state beside accumulate\(\).*accumulate\(optax.chain",
    ),
    "a part that does not accumulate": (
        lambda: jaxmp.loss_scaling(
            optax.partition(
                {"a": accumulate(optax.sgd(1.0), 2), "b": optax.adam(1.0)},
                {"w": "a", "b": "b"},
            ),
            "float32",
        ),
        r"state beside accumulate\(\)",
    ),
}
for name, wrap in {
    "master_weights": master_weights,
    "stochastic_rounding": lambda tx: stochastic_rounding(tx, seed=0),
    "cast_state": lambda tx: cast_state(tx, "bfloat16"),
    "accumulate": lambda tx: accumulate(tx, 2),
}.items():
    ORDERS[f"loss_scaling inside {name}"] = (
        lambda wrap=wrap: wrap(jaxmp.loss_scaling(optax.adam(1.0), "float32")),
        rf"loss_scaling\(\) stands inside {name}\(\).*outermost",
    )


@pytest.mark.parametrize(("make", "message"), ORDERS.values(), ids=ORDERS)
def test_orders_that_cannot_work_are_refused_by_name(make, message):
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(TransformationOrder, match=message):
        make().init(params)
