"""Eight devices: a bad gradient on one makes all skip, and there is one scale."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.errors import UnknownAxis

pytestmark = pytest.mark.devices(8)

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
SHARDED_TX = jaxmp.loss_scaling(TX, "mixed_float16")
AXIS_TX = jaxmp.loss_scaling(TX, "mixed_float16", axis_name="data")


def loss_fn(w, x):
    half = x.astype(jnp.float16) * w.astype(jnp.float16)[None]
    return jnp.mean(half.astype(jnp.float32) ** 2)


@functools.cache
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def batch(bad_device=None):
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    if bad_device is not None:
        x[bad_device, 3] = np.nan
    return jnp.asarray(x)


@functools.cache
def jit_step(params_spec):
    sharding = NamedSharding(mesh(), params_spec)

    @jax.jit
    def step(w, state, x):
        loss, grads = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=state)
        grads = jax.lax.with_sharding_constraint(grads, sharding)
        updates, state = SHARDED_TX.update(grads, state, w, value=loss)
        return optax.apply_updates(w, updates), state, loss

    def run(w, x):
        w = jax.device_put(w, sharding)
        x = jax.device_put(x, NamedSharding(mesh(), P("data")))
        return step(w, jax.jit(SHARDED_TX.init)(w), x)

    return run


@functools.cache
def shard_map_step(check_vma, reduce):
    def step(w, state, x):
        # Else JAX sums the gradients of a replicated weight over the axis itself, where
        # it meets the batch: in float16.
        local_w = jax.lax.pcast(w, "data", to="varying") if check_vma else w
        loss, grads = jaxmp.value_and_grad(loss_fn)(local_w, x, loss_scale=state)
        if reduce:
            loss, grads = jax.lax.pmean((loss, grads), "data")
        updates, state = AXIS_TX.update(grads, state, w, value=loss)
        return optax.apply_updates(w, updates), state, jax.lax.pmean(loss, "data")

    if reduce:
        specs = (P(), P(), P())
    else:
        state_specs = jax.eval_shape(AXIS_TX.init, jnp.ones(16))
        is_scalar = jax.tree.map(lambda x: x.ndim == 0, state_specs)
        state_specs = jax.tree.map(lambda s: P() if s else P("data"), is_scalar)
        specs = (P("data"), state_specs, P())
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh(),
            in_specs=(P(), P(), P("data")),
            out_specs=specs,
            check_vma=check_vma,
        )
    )


def jitted(params_spec):
    return jit_step(params_spec)


def shard_mapped(check_vma):
    step = shard_map_step(check_vma, True)
    return lambda w, x: step(w, AXIS_TX.init(w), x)


STEPS = {
    "jit, replicated parameters": lambda: jitted(P()),
    "jit, sharded parameters": lambda: jitted(P("data")),
    "shard_map": lambda: shard_mapped(True),
    "shard_map, check_vma=False": lambda: shard_mapped(False),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("bad_device", [0, 5])
def test_nan_on_one_device_makes_all_skip_and_keeps_one_scale(name, bad_device):
    w = jnp.linspace(0.5, 1.5, 16)
    new, state, _ = STEPS[name]()(w, batch(bad_device))
    for shard in new.addressable_shards:
        assert shard.data.tobytes() == w[shard.index].tobytes()
    for scalar in (state.loss_scale, state.skipped_steps, state.grads_finite):
        copies = {float(shard.data) for shard in scalar.addressable_shards}
        assert len(scalar.addressable_shards) == 8
        assert len(copies) == 1
    assert float(state.loss_scale) == 2.0**15
    assert int(state.skipped_steps) == 1
    assert int(state.loss_finite) == 0
    assert all(np.all(x == 0) for x in jax.tree.leaves(state.inner_state))


@pytest.mark.parametrize("name", STEPS)
def test_a_good_step_is_that_of_one_device(name):
    w = jnp.linspace(0.5, 1.5, 16)
    new, state, loss = STEPS[name]()(w, batch())
    tx = jaxmp.loss_scaling(TX, "mixed_float16")

    def one_device(w, x, state):
        loss, grads = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=state)
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), loss

    expected, expected_loss = jax.jit(one_device)(w, batch(), tx.init(w))
    # Means over devices and examples round in another order.
    np.testing.assert_allclose(new, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert int(state.applied_steps) == 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_axis_name_decides_for_gradients_that_nobody_reduced(check_vma):
    """Without a reduction the flag alone keeps replicas together."""
    w = jnp.linspace(0.5, 1.5, 16)
    step = shard_map_step(check_vma, False)
    new, state, _ = step(w, AXIS_TX.init(w), batch(bad_device=2))
    for shard in new.addressable_shards:
        assert shard.data.tobytes() == w.tobytes()
    assert {float(s.data) for s in state.loss_scale.addressable_shards} == {2.0**15}


def test_explicit_sharding_keeps_every_type():
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    @jax.jit
    def step(w, state):
        loss, grads = jaxmp.value_and_grad(
            lambda w: jnp.sum(w.astype(jnp.float16) * 2).astype(jnp.float32)
        )(w, loss_scale=state)
        updates, state = SHARDED_TX.update(grads, state, w, value=loss)
        return optax.apply_updates(w, updates), state

    with jax.set_mesh(explicit):
        w = jax.device_put(jnp.ones(16), NamedSharding(explicit, P("data")))
        state = SHARDED_TX.init(w)
        types = jax.tree.map(jax.typeof, (w, state))
        for _ in range(3):
            w, state = step(w, state)
        assert jax.tree.map(jax.typeof, (w, state)) == types
        # The scale of a float16 sum is capped at 2^15, and twice that is infinite.
        assert (int(state.applied_steps), int(state.skipped_steps)) == (1, 2)


def test_two_axes_decide_together():
    devices = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16", axis_name=("a", "b"))

    def step(state, grads):
        _, state = tx.update(grads, state)
        return state.loss_scale, state.grads_finite

    grads = jnp.ones((4, 2)).at[1, 1].set(jnp.inf)
    scale, finite = jax.jit(
        jax.shard_map(
            step, mesh=devices, in_specs=(P(), P("a", "b")), out_specs=(P(), P())
        )
    )(tx.init(jnp.ones((4, 2))), grads)
    assert (float(scale), bool(finite)) == (2.0**15, False)


pmap = getattr(jax, "pmap", None)


@pytest.mark.skipif(pmap is None, reason="this JAX has no pmap")
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap_over_an_axis_skips_on_all_and_keeps_one_scale(reduce):
    def step(w, state, x):
        loss, grads = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=state)
        grads = jax.lax.pmean(grads, "data") if reduce else grads
        updates, state = AXIS_TX.update(grads, state, w, value=loss)
        return optax.apply_updates(w, updates), state

    w = jnp.linspace(0.5, 1.5, 16)
    replicate = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * 8))
    args = replicate((w, AXIS_TX.init(w)))
    new, state = pmap(step, axis_name="data")(*args, batch(bad_device=5)[:, None])
    np.testing.assert_array_equal(new, np.stack([w] * 8))
    assert state.loss_scale.tolist() == [2.0**15] * 8
    assert state.skipped_steps.tolist() == [1] * 8
    with pytest.raises(jaxmp.errors.LossScaleCollapsed):
        jaxmp.raise_if_collapsed(state, max_consecutive_skips=1)


def test_sharded_state_is_donated_and_keeps_its_sharding():
    sharding = NamedSharding(mesh(), P("data"))
    w = jax.device_put(jnp.linspace(0.5, 1.5, 16), sharding)
    state = SHARDED_TX.init(w)

    def step(w, state, grads):
        updates, state = SHARDED_TX.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    old = [x for x in jax.tree.leaves((w, state)) if x.size > 1]
    shardings = [x.sharding for x in old]
    for bad in (False, True, False):
        grads = jax.device_put(jnp.where(bad, jnp.nan, jnp.ones(16)), sharding)
        w, state = step(w, state, grads)
    assert [x.is_deleted() for x in old] == [True] * len(old)
    new = [x for x in jax.tree.leaves((w, state)) if x.size > 1]
    assert [x.sharding for x in new] == shardings
    assert int(state.applied_steps) == 2


def test_a_bad_value_on_one_device_of_an_explicit_mesh_skips_on_all():
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    @jax.jit
    def step(w, state, x):
        loss, grads = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=state)
        updates, state = SHARDED_TX.update(grads, state, w, value=loss)
        return optax.apply_updates(w, updates), state

    with jax.set_mesh(explicit):
        w = jax.device_put(jnp.linspace(0.5, 1.5, 16), NamedSharding(explicit, P()))
        state = SHARDED_TX.init(w)
        for bad, applied in ((5, 0), (None, 1)):
            x = jax.device_put(batch(bad), NamedSharding(explicit, P("data")))
            new, state = step(w, state, x)
            assert int(state.applied_steps) == applied
            for shard in new.addressable_shards:
                is_same = shard.data.tobytes() == w[shard.index].tobytes()
                assert is_same == (bad is not None)
    assert float(state.loss_scale) == 2.0**15


# Stages of a pipeline: devices hold different weights


@functools.cache
def pipeline_step(shape, names):
    """Each device of the axis "stage" has a layer of its own, and gradients for it."""
    devices = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    tx = jaxmp.loss_scaling(optax.adamw(0.1), "mixed_float16", axis_name="stage")

    def step(w, state, grads):
        if "data" in names:
            grads = jaxmp.sharding.reduce_gradients(grads, "data")
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    first = tx.init(jnp.ones((devices.shape["stage"], 3)))
    specs = jax.tree.map(lambda x: P("stage") if x.ndim else P(), first)
    step = jax.shard_map(
        step,
        mesh=devices,
        in_specs=(
            P("stage"),
            specs,
            P(("stage", "data") if "data" in names else "stage"),
        ),
        out_specs=(P("stage"), specs),
    )
    return jax.jit(step), first


@pytest.mark.parametrize(
    ("shape", "names"), [((8,), ("stage",)), ((4, 2), ("stage", "data"))]
)
def test_stages_with_different_weights_decide_together(shape, names):
    step, state = pipeline_step(shape, names)
    count = shape[0]
    w = jnp.arange(count * 3.0).reshape(count, 3)
    grads = jnp.ones((8, 3))
    new, state = step(w, state, grads.at[6, 1].set(jnp.inf))
    assert new.tobytes() == w.tobytes()
    assert int(state.skipped_steps) == 1
    scales = {float(shard.data) for shard in state.loss_scale.addressable_shards}
    assert scales == {2.0**15}
    new, state = step(w, state, grads)
    assert int(state.applied_steps) == 1
    assert np.all(np.asarray(new) != np.asarray(w))


def test_the_decision_comes_after_the_reduction():
    """Every device's gradient is finite, and their sum is not."""
    tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16")

    def step(w, state, grads):
        grads = jaxmp.sharding.reduce_gradients(grads, "data", mean=False)
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    step = jax.jit(
        jax.shard_map(
            step, mesh=mesh(), in_specs=(P(), P(), P("data")), out_specs=(P(), P())
        )
    )
    w = jnp.ones(1)
    new, state = step(w, tx.init(w), jnp.full(8, 1e38))
    assert all(x.data.tobytes() == w.tobytes() for x in new.addressable_shards)
    assert (float(state.loss_scale), int(state.skipped_steps)) == (2.0**15, 1)
    new, state = step(w, state, jnp.full(8, 1e37))
    assert int(state.applied_steps) == 1


# What it costs

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
)


LAYOUTS = {
    "data parallel": (P(), P("data")),
    "weights sharded": (P("data"), P("data")),
    "tensor parallel": (P("data"), P(None, "data")),
}


def collectives(tx, layout):
    """The collectives of a compiled step over eight devices, and their results' sizes.

    XLA joins sums that it can do at once: these are one collective with more results.
    """
    params_spec, rows_spec = LAYOUTS[layout]

    def step(w, state, x):
        scale = state if hasattr(state, "loss_scale") else jaxmp.NoOpLossScale()
        loss, grads = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=scale)
        grads = jax.lax.with_sharding_constraint(grads, sharding)
        kwargs = {"value": loss} if hasattr(state, "loss_scale") else {}
        updates, state = tx.update(grads, state, w, **kwargs)
        return optax.apply_updates(w, updates), state, loss

    sharding = NamedSharding(mesh(), params_spec)
    w = jnp.linspace(0.5, 1.5, 16)
    state = jax.eval_shape(tx.init, w)
    shardings = jaxmp.sharding.state_shardings(state, w, sharding, over=())
    rows = NamedSharding(mesh(), rows_spec)
    everywhere = NamedSharding(mesh(), P())
    step = jax.jit(
        step,
        in_shardings=(sharding, shardings, rows),
        out_shardings=(sharding, shardings, everywhere),
    )
    text = step.lower(w, state, batch()).compile().as_text()
    found = COLLECTIVE.findall(text)
    sizes = [
        int(n or 1) for types, _ in found for n in re.findall(r"\w\[(\d*)\]", types)
    ]
    return sorted(kind for _, kind in found), sorted(sizes)


@pytest.mark.optimised
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_the_decision_costs_no_collective(layout, policy):
    """With a clip, whose norm is a sum over all devices just as the count of NaNs."""
    without, _ = collectives(TX, layout)
    assert without
    assert collectives(jaxmp.loss_scaling(TX, policy), layout)[0] == without


@pytest.mark.optimised
def test_without_a_clip_the_count_of_nans_is_one_number_more_in_a_sum():
    """Where devices have parts of the gradients; else they count what all have."""
    bare = optax.adamw(0.1)
    scaled = jaxmp.loss_scaling(bare, "mixed_float16")
    assert collectives(scaled, "data parallel") == collectives(bare, "data parallel")
    for layout in ("weights sharded", "tensor parallel"):
        kinds, sizes = collectives(bare, layout)
        assert collectives(scaled, layout) == (kinds, [1, *sizes])


def test_an_axis_that_nothing_binds_is_named_with_the_repair():
    w = jnp.ones(2)
    for update in (AXIS_TX.update, jax.jit(AXIS_TX.update)):
        with pytest.raises(UnknownAxis, match=r"'data'.*leave axis_name out"):
            update(w, AXIS_TX.init(w), w)
