"""Weights are gathered in half, and their gradients reduced as the caller says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.errors import (
    PartitionMismatch,
    ReduceDtypeError,
    ShardingOptionError,
    UnknownAxis,
)
from jaxmp.sharding import gather_weights
from jaxmp.testing import equations

pytestmark = pytest.mark.devices(8)

SPECS = {"w": P("data"), "out": P(None, "data"), "b": P()}
CHECKS = pytest.mark.parametrize("check_vma", [True, False])


@functools.cache
def mesh(shape=(8,), names=("data",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def params():
    draw = np.random.default_rng(0).normal
    return {
        "w": jnp.asarray(draw(size=(16, 8)), jnp.float32),
        "out": jnp.asarray(draw(size=(8, 16)), jnp.float32),
        "b": jnp.asarray(draw(size=16), jnp.float32),
    }


def batch():
    return jnp.asarray(np.random.default_rng(1).normal(size=(32, 16)), jnp.float32)


def loss_of(weights, x):
    x = x.astype(weights["w"].dtype)
    h = jnp.tanh(x @ weights["w"]) @ weights["out"] + weights["b"][None]
    return jnp.mean(h.astype(jnp.float32) ** 2)


def gradient(check_vma=True, mean=True, **options):
    def loss_fn(shards, x):
        whole = gather_weights(shards, "data", specs=SPECS, mean=mean, **options)
        return loss_of(whole, x)

    return jax.shard_map(
        jax.grad(loss_fn),
        mesh=mesh(),
        in_specs=(SPECS, P("data")),
        out_specs=SPECS,
        check_vma=check_vma,
    )


def dtypes_of(fn, *args):
    """Which collectives a program has, each with the dtype that it sends."""
    found = set()
    for _, eqn in equations(jax.make_jaxpr(fn)(*args)):
        name, sent = eqn.primitive.name, eqn.invars[0].aval if eqn.invars else None
        if name.startswith(("all_gather", "psum", "reduce_scatter")) and sent.ndim:
            found.add((name.split("_inv")[0], sent.dtype.name))
    return found


@CHECKS
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_gradients_are_those_of_one_device(check_vma, half):
    found = jax.jit(gradient(check_vma, policy=half))(params(), batch())

    def one_device(params, x):
        return loss_of(jax.tree.map(lambda w: w.astype(half), params), x)

    expected = jax.jit(jax.grad(one_device))(params(), batch())
    for name, grad in found.items():
        assert grad.dtype == jnp.float32
        assert grad.sharding.is_equivalent_to(
            NamedSharding(mesh(), SPECS[name]), grad.ndim
        )
        # Each device rounds its part of the sum to half.
        ulp = float(jnp.finfo(half).eps) * np.abs(expected[name]).max()
        np.testing.assert_allclose(grad, expected[name], atol=2 * ulp * 8**0.5)


@CHECKS
@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16", None])
def test_the_gather_is_in_half_and_the_sum_in_the_dtype_asked_for(
    check_vma, reduce_dtype
):
    fn = gradient(check_vma, policy="mixed_bfloat16", reduce_dtype=reduce_dtype)
    found = dtypes_of(fn, params(), batch())
    reduced = reduce_dtype or "bfloat16"
    assert found == {
        ("all_gather", "bfloat16"),
        ("reduce_scatter", reduced),
        ("psum", reduced),
    }


@CHECKS
def test_a_sum_is_the_default_and_the_mean_is_divided_first(check_vma):
    sums = jax.jit(gradient(check_vma, mean=False))(params(), batch())
    means = jax.jit(gradient(check_vma, mean=True))(params(), batch())
    for x, y in zip(jax.tree.leaves(sums), jax.tree.leaves(means), strict=True):
        np.testing.assert_array_equal(x, 8 * y)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(means))


def test_a_float16_sum_does_not_overflow_where_its_mean_does_not():
    def loss_fn(w, x):
        options = {"policy": "float16", "reduce_dtype": "float16"}
        w = gather_weights(w, "data", specs=P("data"), mean=True, **options)
        return jnp.sum((w * x.astype(w.dtype)).astype(jnp.float32))

    fn = jax.shard_map(
        jax.grad(loss_fn),
        mesh=mesh(),
        in_specs=(P("data"), P()),
        out_specs=P("data"),
    )
    grads = jax.jit(fn)(jnp.ones(8), jnp.full(8, 32_768.0))
    np.testing.assert_array_equal(grads, np.full(8, 32_768.0))


@CHECKS
def test_other_axes_stay_sharded(check_vma):
    specs = {"w": P("data", "model"), "both": P(("model", "data"))}
    weights = {
        "w": jnp.arange(32.0).reshape(8, 4),
        "both": jnp.arange(16.0).reshape(16, 1),
    }

    def fn(shards):
        whole = gather_weights(shards, "data", specs=specs, policy="float32")
        assert whole["w"].shape == (8, 2)
        assert whole["both"].shape == (8, 1)
        if check_vma:  # what was gathered is the same along the axis, unknown to JAX
            whole = jax.tree.map(lambda x: jax.lax.pmax(x, "data"), whole)
        return whole

    out = {"w": P(None, "model"), "both": P("model")}
    found = jax.jit(
        jax.shard_map(
            fn,
            mesh=mesh((4, 2), ("data", "model")),
            in_specs=(specs,),
            out_specs=out,
            check_vma=check_vma,
        )
    )(weights)
    for name, x in found.items():
        np.testing.assert_array_equal(x, weights[name])


@CHECKS
def test_weights_that_other_axes_hold_whole_are_summed_over_these_too(check_vma):
    """Sharded in each group, replicated over groups."""
    devices = mesh((2, 4), ("group", "data"))
    axes = ("group", "data")

    def loss_fn(w, x):
        w = gather_weights(w, axes, specs=P("data"), policy="float32", mean=True)
        return jnp.mean((x @ w) ** 2)

    fn = jax.jit(
        jax.shard_map(
            jax.grad(loss_fn),
            mesh=devices,
            in_specs=(P("data"), P(axes)),
            out_specs=P("data"),
            check_vma=check_vma,
        )
    )
    w = params()["w"]
    expected = jax.grad(lambda w: jnp.mean((batch() @ w) ** 2))(w)
    np.testing.assert_allclose(fn(w, batch()), expected, rtol=1e-5, atol=1e-6)


def test_layers_in_a_scan_are_gathered_in_it_again_by_the_backward_pass():
    layers = jnp.ones((3, 16, 16)) / 16

    def loss_fn(layers, x):
        @jax.checkpoint
        def layer(x, w):
            w = gather_weights(w, "data", specs=P("data"), mean=True)
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(layer, x.astype(jnp.bfloat16), layers)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    fn = jax.shard_map(
        jax.grad(loss_fn),
        mesh=mesh(),
        in_specs=(P(None, "data"), P("data")),
        out_specs=P(None, "data"),
    )
    assert dtypes_of(fn, layers, batch()) == {
        ("all_gather", "bfloat16"),
        ("reduce_scatter", "float32"),
    }
    grads = jax.jit(fn)(layers, batch())
    assert bool(jnp.all(jnp.isfinite(grads)))
    assert float(jnp.abs(grads).max()) > 0


def test_what_is_not_floating_is_gathered_as_it_is():
    tree = {
        "n": jnp.arange(8),
        "none": None,
        "name": 3,
        "z": jnp.ones(8, jnp.complex64),
    }
    specs = {"n": P("data"), "none": None, "name": P(), "z": P("data")}

    def fn(n, z):
        shards = {**tree, "n": n, "z": z}
        whole = gather_weights(shards, "data", specs=specs)
        assert whole["none"] is None
        assert whole["name"] == 3
        return whole["n"], whole["z"]

    n, z = jax.shard_map(
        fn,
        mesh=mesh(),
        in_specs=(P("data"), P("data")),
        out_specs=(P(), P()),
        check_vma=False,
    )(tree["n"], tree["z"])
    np.testing.assert_array_equal(n, tree["n"])
    assert z.dtype == jnp.complex64


@CHECKS
def test_a_training_step_by_hand_skips_and_applies_on_all_devices(check_vma):
    tx = jaxmp.loss_scaling(
        optax.adam(0.1), "mixed_float16", axis_name="data", init_scale=2.0**8
    )
    state_specs = jaxmp.sharding.state_shardings(
        jax.eval_shape(tx.init, params()),
        params(),
        jax.tree.map(lambda spec: NamedSharding(mesh(), spec), SPECS),
        over=(),
    )
    state_specs = jax.tree.map(lambda s: s.spec, state_specs)

    def step(shards, state, x):
        def loss_fn(shards):
            return loss_of(
                gather_weights(
                    shards, "data", specs=SPECS, policy="mixed_float16", mean=True
                ),
                x,
            )

        loss, grads = jaxmp.value_and_grad(loss_fn)(shards, loss_scale=state)
        updates, state = tx.update(grads, state, shards, value=loss)
        return optax.apply_updates(shards, updates), state

    step = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh(),
            in_specs=(SPECS, state_specs, P("data")),
            out_specs=(SPECS, state_specs),
            check_vma=check_vma,
        )
    )
    old, state = params(), tx.init(params())
    new, state = step(old, state, batch().at[5, 2].set(jnp.inf))
    for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert float(state.loss_scale) == 2.0**7
    new, state = step(new, state, batch())
    assert int(state.applied_steps) == 1
    assert float(jnp.abs(new["w"] - old["w"]).max()) > 0.05


# Meshes with explicit axes


def explicit_gradient(loss_fn, *args):
    devices = mesh(kind=AxisType.Explicit)
    with jax.set_mesh(devices):
        w = jax.device_put(params()["w"], NamedSharding(devices, P("data")))
        x = jax.device_put(batch(), NamedSharding(devices, P("data")))
        fn = jax.grad(loss_fn)
        return jax.jit(fn)(w, x, *args), str(jax.make_jaxpr(fn)(w, x, *args))


@pytest.mark.parametrize("reduce_dtype", ["float32", None])
def test_explicit_axes_need_no_specs(reduce_dtype):
    def loss_fn(w, x):
        w = gather_weights(w, "data", reduce_dtype=reduce_dtype)
        assert w.dtype == jnp.bfloat16
        return jnp.mean((x.astype(w.dtype) @ w).astype(jnp.float32) ** 2)

    grads, program = explicit_gradient(loss_fn)
    w, x = params()["w"], batch()
    half = jnp.bfloat16
    expected = jax.grad(
        lambda w: jnp.mean((x.astype(half) @ w.astype(half)).astype(jnp.float32) ** 2)
    )(w)
    np.testing.assert_allclose(grads, expected, atol=0.02)
    assert grads.dtype == jnp.float32
    assert grads.sharding.spec == P("data", None)
    # What waits to be summed over the devices, `U`, does so in the dtype asked for.
    assert ("f32[16,8]{U:data}" in program) == (reduce_dtype == "float32")


def test_explicit_lookups_are_summed_in_float32():
    def loss_fn(w, x, ids):
        table = gather_weights(w, "data")
        rows = table.at[ids].get(out_sharding=P("data", None))
        return jnp.sum(rows.astype(jnp.float32)) + 0 * jnp.sum(x)

    ids = jax.device_put(
        jnp.zeros(32, jnp.int32),
        NamedSharding(mesh(kind=AxisType.Explicit), P("data")),
    )
    grads, _ = explicit_gradient(loss_fn, ids)
    np.testing.assert_array_equal(np.asarray(grads)[0], np.full(8, 32.0))


def test_explicit_weights_of_one_axis_may_meet_elementwise_arithmetic():
    def loss_fn(w, x):
        w = gather_weights(w[:, 0], "data")
        return jnp.mean((x.astype(w.dtype) * w[None]).astype(jnp.float32) ** 2)

    grads, _ = explicit_gradient(loss_fn)
    grads = np.asarray(grads)
    assert np.abs(grads[:, 0]).max() > 0
    np.testing.assert_array_equal(grads[:, 1:], 0)


# Bad input


OVER_DATA = P("data")


def in_shard_map(fn, specs=OVER_DATA, **kwargs):
    return jax.shard_map(
        fn, mesh=mesh(**kwargs), in_specs=(specs,), out_specs=P(), check_vma=False
    )(jnp.ones((16, 16)))


def test_an_axis_that_nothing_binds_is_named_with_the_repair():
    for fn in (jax.jit, lambda fn: fn):
        with pytest.raises(UnknownAxis, match=r"'data', which is not bound.*cast_to_c"):
            fn(lambda w: gather_weights(w, "data", specs=P("data")))(jnp.ones((8, 8)))
    with pytest.raises(UnknownAxis, match=r"'dta'.*bound by the mesh: 'data'"):
        in_shard_map(lambda w: gather_weights(w, "dta", specs=P("data")))


def test_specs_are_needed_and_have_to_fit():
    with pytest.raises(ShardingOptionError, match=r"specs=P\('data'\)"):
        in_shard_map(lambda w: gather_weights(w, "data"))
    with pytest.raises(PartitionMismatch, match=r"'w' has the shape \(2, 16\).*3 entr"):
        in_shard_map(
            lambda w: gather_weights({"w": w}, "data", specs=P("data", None, None))
        )
    with pytest.raises(PartitionMismatch, match=r"specs= is neither.*in_specs"):
        in_shard_map(lambda w: gather_weights({"w": w}, "data", specs={"v": P()}))
    with pytest.raises(PartitionMismatch, match=r"Dimension 0.*Name \('data',\) last"):
        in_shard_map(
            lambda w: gather_weights(w, "data", specs=P(("data", "model"))),
            specs=P(("data", "model")),
            shape=(4, 2),
            names=("data", "model"),
        )


def test_a_float16_sum_needs_a_policy_with_a_loss_scale():
    with pytest.raises(ReduceDtypeError, match=r"'p=full,c=bf16,o=full' has none"):
        in_shard_map(
            lambda w: gather_weights(w, "data", specs=P("data"), reduce_dtype="float16")
        )
    with pytest.raises(ReduceDtypeError, match=r"'int8'.*Use one of"):
        in_shard_map(
            lambda w: gather_weights(w, "data", specs=P("data"), reduce_dtype="int8")
        )


def test_the_mean_over_devices_has_no_meaning_on_an_explicit_mesh():
    with pytest.raises(ShardingOptionError, match="one loss for all"):
        explicit_gradient(lambda w, x: gather_weights(w, "data", mean=True))
