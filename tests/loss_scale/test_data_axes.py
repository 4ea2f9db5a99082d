"""`value_and_grad(data_axes=...)`: one device's gradients, from one reduction."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.errors import (
    CollectiveInLoss,
    DataAxesError,
    DataAxesOptionError,
    MicroBatchError,
)

pytestmark = pytest.mark.devices(8)

SCALE = jaxmp.StaticLossScale(1024)
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@functools.cache
def mesh_of(shape=(8,), names=("data",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"w": normal(0, 8, 16) / 3, "b": jnp.zeros(16), "out": normal(1, 16, 8) / 4}
X, Y = normal(2, 32, 8), normal(3, 32, 8)
SPECS = {"w": P("data"), "b": P(), "out": P("data")}


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"][None])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def half_loss_fn(params, x, y, dtype=jnp.bfloat16):
    half = jax.tree.map(lambda p: p.astype(dtype), params)
    hidden = jnp.tanh(x.astype(dtype) @ half["w"] + half["b"][None])
    predicted = (hidden @ half["out"]).astype(jnp.float32)
    return jnp.mean((predicted - y) ** 2)


def place(mesh, specs=None):
    specs = specs or dict.fromkeys(PARAMS, P())
    params = {
        k: jax.device_put(p, NamedSharding(mesh, specs[k])) for k, p in PARAMS.items()
    }
    rows = NamedSharding(mesh, P(mesh.axis_names[0]))
    return params, *jax.device_put((X, Y), rows)


def jitted(fun, **kwargs):
    differentiate = jaxmp.value_and_grad(fun, data_axes="data", **kwargs)
    return jax.jit(lambda *args: differentiate(*args, loss_scale=SCALE))


def close(found, expected, dtype="float32"):
    """Whether sums over eight devices are as close as their dtype allows."""

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        bound = 2 * EPS[dtype] * 8**0.5 * max(np.abs(b).max(), 1e-3)
        assert np.abs(a - b).max() <= bound

    jax.tree.map(check, found, expected)


def collectives(compiled):
    """Kind and dtype of every collective of a program, with how many arrays."""
    found = re.findall(
        r" = (\(?[a-z]\w*\[.*?) (all-\w+|reduce-scatter|collective-permute)"
        r"(?:-start)?\(",
        compiled.as_text(),
    )
    return sorted(
        (kind, dtype)
        for types, kind in found
        for dtype in re.findall(r"(\w+)\[", types)
    )


# Gradients


@pytest.mark.parametrize("micro_batches", [None, 2, 4])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_it_is_the_gradient_of_one_device(micro_batches, dtype):
    step = jitted(loss_fn, micro_batches=micro_batches, reduce_dtype=dtype)
    loss, grads = step(*place(mesh_of()))
    expected_loss, expected = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
    close(grads, expected, dtype or "float32")
    close(loss, expected_loss)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("gather", ["micro_batch", "window"])
@pytest.mark.parametrize(
    "specs", [SPECS, {"w": P(None, "model"), "b": P(), "out": P()}]
)
def test_sharded_weights_on_automatic_and_explicit_axes(kind, gather, specs):
    mesh = mesh_of((4, 2), ("data", "model"), kind)

    def fun(params, x, y):
        if "model" in specs["w"] and kind == AxisType.Explicit:
            params = {**params, "w": jax.sharding.reshard(params["w"], P())}
        return loss_fn(params, x, y)

    with jax.set_mesh(mesh):
        step = jitted(fun, micro_batches=2, gather=gather, grad_shardings=specs)
        loss, grads = step(*place(mesh, specs))
    close((loss, grads), jax.value_and_grad(loss_fn)(PARAMS, X, Y))
    assert P(*grads["w"].sharding.spec[: len(specs["w"])]) == specs["w"]


@pytest.mark.parametrize("way", ["set_mesh", "with", "mesh=", "arguments", "eager"])
def test_ways_to_name_the_mesh(way, recwarn):
    mesh, args = mesh_of(), place(mesh_of())
    step = jitted(loss_fn, mesh=mesh if way == "mesh=" else None)
    if way == "set_mesh":
        with jax.set_mesh(mesh):
            grads = step(PARAMS, X, Y)[1]
    elif way == "with":
        with mesh:
            grads = step(PARAMS, X, Y)[1]
        recwarn.clear()  # JAX deprecates it
    elif way == "mesh=":
        grads = step(PARAMS, X, Y)[1]
    elif way == "arguments":
        grads = step(*args)[1]
    else:
        differentiate = jaxmp.value_and_grad(loss_fn, data_axes="data")
        grads = differentiate(*args, loss_scale=SCALE)[1]
    close(grads, jax.grad(loss_fn)(PARAMS, X, Y))


def test_several_axes_together():
    mesh = mesh_of((2, 4), ("replica", "data"))
    differentiate = jaxmp.value_and_grad(loss_fn, data_axes=("replica", "data"))
    rows = NamedSharding(mesh, P(("replica", "data")))
    args = jax.device_put((X, Y), rows)
    grads = jax.jit(lambda *a: differentiate(*a, loss_scale=SCALE))(PARAMS, *args)[1]
    close(grads, jax.grad(loss_fn)(PARAMS, X, Y))


@pytest.mark.parametrize(
    ("micro_batches", "data_axes"), [(2, None), (None, "data"), (2, "data")]
)
def test_a_loss_that_is_a_sum(micro_batches, data_axes):
    def sum_fn(params, x, y):
        return loss_fn(params, x, y) * x.size

    differentiate = jaxmp.value_and_grad(
        sum_fn, data_axes=data_axes, micro_batches=micro_batches, loss_is="sum"
    )
    found = jax.jit(lambda *a: differentiate(*a, loss_scale=SCALE))(*place(mesh_of()))
    close(found, jax.value_and_grad(sum_fn)(PARAMS, X, Y))


def test_grad_and_train_state_pass_it_on():
    args = place(mesh_of())
    expected = jax.grad(loss_fn)(PARAMS, X, Y)
    grads = jaxmp.grad(loss_fn, data_axes="data")(*args, loss_scale=SCALE)
    close(grads, expected)
    state = jaxmp.TrainState.create(
        apply_fn=None, params=args[0], tx=optax.sgd(0.1), policy="mixed_float16"
    )
    _, grads = state.value_and_grad(loss_fn, data_axes="data", micro_batches=2)(*args)
    close(grads, expected)


def test_several_arguments_are_differentiated_and_some_are_keywords():
    def fun(w, x, out, *, y, name):
        assert name == "mse"
        return loss_fn({"w": w, "b": jnp.zeros(16), "out": out}, x, y)

    mesh = mesh_of()
    step = jaxmp.value_and_grad(
        fun,
        (0, -1),
        data_axes="data",
        micro_batches=2,
        grad_shardings=(P("data"), None),
    )
    with jax.set_mesh(mesh):
        run = jax.jit(lambda w, x, out, y: step(w, x, out, y=y, **NAMED))
        grads = run(PARAMS["w"], X, PARAMS["out"], Y)[1]
    expected = jax.grad(loss_fn)(PARAMS, X, Y)
    close(grads, (expected["w"], expected["out"]))
    assert grads[0].sharding.spec[0] == "data"


NAMED = {"loss_scale": SCALE, "name": "mse"}


def test_a_mesh_of_one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    grads = jitted(loss_fn, mesh=mesh, micro_batches=2)(PARAMS, X, Y)[1]
    close(grads, jax.grad(loss_fn)(PARAMS, X, Y))


def test_autocast_inside():
    fun = jaxmp.autocast(loss_fn, "mixed_bfloat16")
    step = jitted(fun, micro_batches=2, gather="window", grad_shardings=SPECS)
    args = place(mesh_of(), SPECS)
    close(step(*args)[1], jax.grad(fun)(PARAMS, X, Y), "bfloat16")
    found = re.findall(
        r"sharding_constraint.*\[\{\}, \{\}\]> : tensor<(.*?)>",
        step.lower(*args).as_text(),
    )
    assert sorted(found) == ["16x8xbf16", "8x16xbf16"]


def test_a_retry_computes_the_same_parts_again():
    fun = functools.partial(half_loss_fn, dtype=jnp.float16)
    tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16", init_scale=2.0**24)
    step = jaxmp.retry(jaxmp.value_and_grad(fun, data_axes="data"), max_retries=20)
    params, x, y = place(mesh_of())
    run = jax.jit(lambda *args: step(*args, loss_scale=tx.init(params)))
    (_, grads), state = run(params, x, y)
    close(grads, jax.grad(fun)(PARAMS, X, Y), "float16")
    assert float(state.loss_scale) < 2.0**24


# Loss scales


def test_float16_gradients_are_summed_under_the_scale():
    def tiny(w, x):
        return jnp.mean(w.astype(jnp.float16) * x).astype(jnp.float32) * 2.0**-23

    x = jnp.ones(64, jnp.float16)
    with jax.set_mesh(mesh_of()):
        step = jaxmp.grad(tiny, data_axes="data", reduce_dtype="float16")
        scale = jaxmp.StaticLossScale(2**14)
        grad = jax.jit(lambda w, x: step(w, x, loss_scale=scale))(jnp.ones(()), x)
    # One eighth of it would vanish in float16 without the scale.
    assert float(grad) == 2.0**-23


def test_a_sum_of_large_float16_gradients_stays_finite():
    def large(w, x):
        return jnp.sum((w.astype(jnp.float16) * x).astype(jnp.float32))

    x = jnp.full(64, 3000.0, jnp.float16)
    with jax.set_mesh(mesh_of()):
        step = jaxmp.grad(
            large, data_axes="data", reduce_dtype="float16", loss_is="sum"
        )
        grad = jax.jit(lambda w, x: step(w, x, loss_scale=SCALE_OF_ONE))(
            jnp.ones(()), x
        )
    assert float(grad) == 64 * 3000


SCALE_OF_ONE = jaxmp.StaticLossScale(1)


def test_an_overflow_on_one_device_skips_the_step_on_all():
    tx = jaxmp.loss_scaling(optax.adamw(0.1), "mixed_float16")
    fun = functools.partial(half_loss_fn, dtype=jnp.float16)
    params, x, y = place(mesh_of())

    @jax.jit
    def step(params, state, x, y):
        loss, grads = jaxmp.value_and_grad(fun, data_axes="data", micro_batches=2)(
            params, x, y, loss_scale=state
        )
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    new, state = step(params, state, x.at[21, 3].set(jnp.inf), y)
    assert int(state.skipped_steps) == 1
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, new, params)))
    new, state = step(params, state, x, y)
    assert int(state.applied_steps) == 1
    for shard in state.loss_scale.addressable_shards:
        assert float(shard.data) == 2.0**15


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batches", [None, 4])
def test_collectives_are_those_without_a_loss_scale(micro_batches, dtype):
    tx = optax.adamw(0.1)
    scaled = jaxmp.loss_scaling(tx, "mixed_float16")
    fun = functools.partial(half_loss_fn, dtype=jnp.float16)
    options = {"data_axes": "data", "micro_batches": micro_batches}
    differentiate = jaxmp.value_and_grad(fun, reduce_dtype=dtype, **options)

    def step(tx, params, state, x, y):
        held = state if hasattr(state, "loss_scale") else jaxmp.NoOpLossScale()
        loss, grads = differentiate(params, x, y, loss_scale=held)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    args = place(mesh_of())

    def compiled(tx):
        state = jax.device_put(tx.init(args[0]), NamedSharding(mesh_of(), P()))
        run = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
        return collectives(run.lower(args[0], state, *args[1:]).compile())

    plain = compiled(tx)
    assert compiled(scaled) == plain
    assert {kind for kind, _ in plain} == {"all-reduce"}
    assert len(plain) == len(PARAMS) + 1  # and the loss


# What is where


def test_nothing_of_the_batch_leaves_its_device():
    step = jitted(loss_fn, micro_batches=2)
    text = step.lower(*place(mesh_of())).compile().as_text()
    for kind in ("all-to-all", "all-gather", "collective-permute"):
        assert kind not in text


def test_weights_are_gathered_once_per_window_in_half():
    args = place(mesh_of(), SPECS)
    step = jitted(half_loss_fn, micro_batches=4, gather="window", grad_shardings=SPECS)
    lowered = step.lower(*args).as_text()
    gathered = re.findall(
        r"sharding_constraint.*\[\{\}, \{\}\]> : tensor<(.*?)>", lowered
    )
    assert sorted(gathered) == ["16x8xbf16", "8x16xbf16"]
    before_the_loop = lowered[: lowered.index("stablehlo.while")]
    assert before_the_loop.count("xbf16>") >= 2


def test_a_weight_that_is_read_in_float32_is_gathered_as_it_is():
    args = place(mesh_of(), SPECS)

    def fun(params, x, y):
        return half_loss_fn(params, x, y) + jnp.sum(params["w"] ** 2)

    step = jitted(fun, micro_batches=2, gather="window", grad_shardings=SPECS)
    lowered = step.lower(*args).as_text()
    gathered = re.findall(
        r"sharding_constraint.*\[\{\}, \{\}\]> : tensor<(.*?)>", lowered
    )
    assert sorted(gathered) == ["16x8xbf16", "8x16xf32"]
    close(step(*args)[1], jax.grad(fun)(PARAMS, X, Y), "bfloat16")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_constraints_in_the_model_that_name_the_axis(wrap):
    mesh = mesh_of((4, 2), ("data", "model"))

    def fun(params, x, y):
        def layer(x):
            hidden = jnp.tanh(x @ params["w"])
            spec = NamedSharding(mesh, P("data", "model"))
            return jax.lax.with_sharding_constraint(hidden, spec)

        return jnp.mean((wrap(layer)(x) @ params["out"] - y) ** 2)

    step = jitted(fun, micro_batches=2, mesh=mesh)
    grads = step(*place(mesh))[1]
    close(grads, jax.grad(fun)(PARAMS, X, Y))


# What the loss function returns besides


@pytest.mark.parametrize("micro_batches", [None, 2])
def test_auxiliary_outputs_keep_the_order_of_the_batch(micro_batches):
    def with_aux(params, x, y):
        aux = {"each": x[:, 0], "mean": x.mean(0), "count": jnp.int32(7)}
        return loss_fn(params, x, y), aux

    options = {"has_aux": True, "micro_batches": micro_batches}
    (_, aux), _ = jitted(with_aux, **options)(*place(mesh_of()))
    parts = 8 * (micro_batches or 1)
    assert aux["mean"].shape == (parts, 8)
    assert jnp.array_equal(aux["each"].reshape(32), X[:, 0])
    assert aux["count"].tolist() == [7] * parts
    averaged = jitted(with_aux, micro_batch_aux="mean", **options)
    (_, aux), _ = averaged(*place(mesh_of()))
    close(aux["mean"], X.mean(0))
    assert int(aux["count"]) == 7


def test_every_part_gets_a_random_key_of_its_own():
    def noisy(w, x, key):
        noise = jax.random.normal(key, ())
        return jnp.mean(w * x), noise

    step = jaxmp.value_and_grad(noisy, has_aux=True, data_axes="data", micro_batches=2)
    with jax.set_mesh(mesh_of()):
        (_, noise), _ = jax.jit(lambda *a: step(*a, loss_scale=SCALE))(
            jnp.ones(()), X, jax.random.key(0)
        )
    assert len(set(noise.tolist())) == 16


def test_integers_have_no_gradient_and_float8_metadata_the_largest():
    def fun(params, x):
        history = params["_overwrite_with_gradient"]["history"]
        return jnp.mean(pushed(params["w"] * x, history)) + 0.0 * params["n"]

    @jax.custom_vjp
    def pushed(x, history):
        return x

    pushed.defvjp(
        lambda x, history: (x, (jnp.max(x), history)),
        lambda kept, ct: (ct, jnp.roll(kept[1], 1).at[0].set(kept[0])),
    )
    params = {
        "w": jnp.ones(()),
        "n": jnp.int32(3),
        "_overwrite_with_gradient": {"history": jnp.zeros(4)},
    }
    step = jaxmp.grad(fun, data_axes="data", allow_int=True)
    x = jnp.arange(32.0)
    with jax.set_mesh(mesh_of()):
        grads = jax.jit(lambda *a: step(*a, loss_scale=SCALE))(params, x)
    assert grads["n"].dtype == jax.dtypes.float0
    assert float(grads["w"]) == 15.5
    assert grads["_overwrite_with_gradient"]["history"].tolist() == [31, 0, 0, 0]


# Flax


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, dtype=jnp.bfloat16)(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(x)
        return nn.Dense(8, dtype=jnp.bfloat16)(x).astype(jnp.float32)


def test_a_linen_model_with_batch_norm():
    model = Linen()
    variables = model.init(jax.random.key(0), X)

    def fun(params, stats, x, y):
        predicted, new = model.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return jnp.mean((predicted - y) ** 2), new["batch_stats"]

    options = {"has_aux": True, "micro_batch_aux": "mean", "gather": "window"}
    (_, stats), grads = jitted(fun, mesh=mesh_of(), **options)(
        variables["params"], variables["batch_stats"], X, Y
    )
    whole = fun(variables["params"], variables["batch_stats"], X, Y)[1]
    close(stats["BatchNorm_0"]["mean"], whole["BatchNorm_0"]["mean"], "bfloat16")
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)
        self.tied = self.dense
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.tied(self.dense(x)))


@pytest.mark.parametrize("data_axes", [None, "data"])
def test_an_nnx_model_keeps_its_statistics(data_axes):
    def fun(model, x, y):
        kept = model.dropout(jnp.ones(64)) > 0
        return jnp.mean((model(x) - y) ** 2), kept

    model, whole = (Nnx(nnx.Rngs(0)) for _ in range(2))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    step = jaxmp.value_and_grad(
        fun,
        has_aux=True,
        transform=nnx.value_and_grad,
        data_axes=data_axes,
        micro_batches=2,
        mesh=mesh_of() if data_axes else None,
    )

    @nnx.jit
    def run(model, x, y):
        return step(model, x, y, loss_scale=SCALE)

    (_, kept), grads = run(model, X, Y)
    fun(whole, X, Y)
    close(model.norm.mean[...], whole.norm.mean[...])
    assert not jnp.array_equal(model.norm.var[...], jnp.ones(8))
    assert model.norm.var.dtype == jnp.float32
    streams = [model.dropout.rngs, whole.dropout.rngs]
    assert jnp.array_equal(*(stream.count[...] for stream in streams))
    assert jnp.array_equal(*(jax.random.key_data(s.key[...]) for s in streams))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, before, after)))
    masks = {bytes(np.asarray(mask)) for mask in kept}
    assert len(masks) == len(kept) == (16 if data_axes else 2)
    # The weight that two layers share has one gradient.
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(model, nnx.Param))


# Wrong input


def bad(**kwargs):
    return lambda: jitted(loss_fn, **kwargs)(*place(mesh_of()))


def with_psum(params, x, y):
    return jax.lax.pmean(loss_fn(params, x, y), "data")


def with_shard_map(params, x, y):
    def local(x):
        return jax.lax.pmean(x.mean(), "data")

    mean = jax.shard_map(local, mesh=mesh_of(), in_specs=P("data"), out_specs=P())
    return loss_fn(params, x, y) + mean(x)


def inside_shard_map():
    def local(params, x, y):
        grad = jaxmp.grad(loss_fn, data_axes="data")
        return grad(params, x, y, loss_scale=SCALE)

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    return jax.shard_map(local, mesh=mesh_of(), **specs)(*place(mesh_of()))


def explicit(fun, step=None):
    mesh = mesh_of(kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        return (jax.jit(step) if step else jitted(fun))(*place(mesh))


def closing_over(params, x, y):
    offset = y.mean()

    def fun(params, x, y):
        return loss_fn(params, x + offset, y)

    return jaxmp.grad(fun, data_axes="data")(params, x, y, loss_scale=SCALE)


WRONG = {
    "another axis": (
        lambda: bad(mesh=mesh_of((8,), ("batch",)))(),
        DataAxesError,
        ("data_axes='data'", "['batch']"),
    ),
    "no mesh": (
        lambda: jitted(loss_fn)(PARAMS, X, Y),
        DataAxesError,
        ("no mesh is in sight", "jax.set_mesh(mesh)", "mesh=mesh"),
    ),
    "manual axis": (inside_shard_map, DataAxesError, ("shard_map", "jax.lax.pmean")),
    "indivisible batch": (
        lambda: jitted(loss_fn, mesh=mesh_of())(PARAMS, X[:12], Y[:12]),
        MicroBatchError,
        ("args[1] has the shape [12, 8]", "8 devices", "a batch that 8 divides"),
    ),
    "indivisible with micro-batches": (
        bad(micro_batches=3),
        MicroBatchError,
        ("[32, 8]", "8 devices with 3 micro-batches each", "24 divides"),
    ),
    "psum": (
        lambda: jitted(with_psum)(*place(mesh_of())),
        CollectiveInLoss,
        ("['data']", "pmean", "once"),
    ),
    "psum, explicit": (lambda: explicit(with_psum), CollectiveInLoss, ("pmean",)),
    "shard_map, too few examples": (
        lambda: jitted(with_shard_map)(*place(mesh_of())),
        CollectiveInLoss,
        ("shard_map",),
    ),
    "shard_map": (
        lambda: jitted(with_shard_map, mesh=mesh_of())(
            PARAMS, jnp.tile(X, (2, 1)), jnp.tile(Y, (2, 1))
        ),
        CollectiveInLoss,
        ("shard_map",),
    ),
    "reduce_dtype": (
        bad(reduce_dtype="int8"),
        DataAxesOptionError,
        ("'int8'", "'float32'"),
    ),
    "narrow reduce_dtype": (
        bad(reduce_dtype="float8_e4m3fn"),
        DataAxesOptionError,
        ("float8_e4m3fn", "'bfloat16'"),
    ),
    "unknown reduce_dtype": (bad(reduce_dtype="f33"), DataAxesOptionError, ("'f33'",)),
    "gather": (bad(gather="never"), DataAxesOptionError, ("'never'", "'window'")),
    "loss_is": (bad(loss_is="max"), DataAxesOptionError, ("'max'", "'sum'")),
    "no data_axes": (
        lambda: jaxmp.value_and_grad(loss_fn, reduce_dtype="float32"),
        DataAxesOptionError,
        ("reduce_dtype='float32'", "data_axes='data'"),
    ),
    "empty data_axes": (
        lambda: jaxmp.value_and_grad(loss_fn, data_axes=()),
        DataAxesOptionError,
        ("data_axes=()", "data_axes='data'"),
    ),
    "grad_shardings of another tree": (
        bad(grad_shardings={"w": P(), "b": P()}),
        DataAxesOptionError,
        ("2 leaves", "3 gradients", "NamedSharding"),
    ),
    "grad_shardings of something else": (
        bad(grad_shardings={"w": 1, "b": P(), "out": P()}),
        DataAxesOptionError,
        ("holds 1", "PartitionSpec"),
    ),
    "gather without knowing how weights lie": (
        lambda: jitted(loss_fn, gather="window")(
            *place(mesh_of((4, 2), ("data", "model")))
        ),
        DataAxesError,
        ("gather='window'", "grad_shardings="),
    ),
    "float16 without a scale": (
        lambda: jaxmp.grad(loss_fn, data_axes="data", reduce_dtype="float16")(
            *place(mesh_of()), loss_scale=jaxmp.NoOpLossScale()
        ),
        DataAxesOptionError,
        ("float16", "NoOpLossScale", "'bfloat16'"),
    ),
    "closing over a typed array": (
        lambda: explicit(None, closing_over),
        DataAxesError,
        ("closes over", "argument"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_with_its_repair(case):
    provoke, cls, words = WRONG[case]
    with pytest.raises(cls) as error:
        provoke()
    for word in words:
        assert word in str(error.value)
