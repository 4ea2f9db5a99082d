"""What travels between eight devices, by the compilers that make it travel."""

import functools
import math
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.report import target_devices
from jaxmp.sharding import (
    gather_weights,
    reduce_gradients,
    replicated,
    state_shardings,
)

pytestmark = pytest.mark.targets

WIDTH, WORDS, HEADS = 256, 2048, 4
BYTES = {"bf16": 2, "f16": 2, "f32": 4}
TARGETS = ("h100:8", "tpu-v5e:8")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, dtype=x.dtype, param_dtype=x.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=x.dtype, param_dtype=x.dtype)
        q, k, v = jnp.split(dense(3 * WIDTH)(norm()(x)), 3, axis=-1)
        q, k, v = (t.reshape(*t.shape[:2], HEADS, -1) for t in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / 8
        weights = nn.softmax(scores).astype(x.dtype)
        h = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + dense(WIDTH)(h)
        return x + dense(WIDTH)(nn.gelu(dense(4 * WIDTH)(norm()(x))))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        half = jnp.bfloat16
        table = self.param("table", nn.initializers.normal(), (WORDS, WIDTH), half)
        x = table[tokens]
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(WORDS, use_bias=False, dtype=half, param_dtype=half)(x)


def loss_fn(params, tokens):
    logits = Transformer().apply(params, tokens).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return losses.mean()


@functools.cache
def devices(target):
    return np.array(target_devices(target))


def mesh(target, kind=AxisType.Auto):
    return Mesh(devices(target), ("data",), axis_types=(kind,))


def weights(dtype):
    key, tokens = jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(Transformer().init, key, tokens)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def laid_out(shapes, shardings):
    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)


def tokens_on(target, kind=AxisType.Auto):
    sharding = NamedSharding(mesh(target, kind), P("data"))
    return jax.ShapeDtypeStruct((32, 256), jnp.int32, sharding=sharding)


class Traffic(NamedTuple):
    """What one device sends in a step, in MiB, by kind and dtype."""

    wire: dict
    arguments: float


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter)(-start)?\(.*?replica_groups=(\S+)"
)


def traffic(compiled):
    """Counts the H100's collectives. Small ones, as of the norm, are left out."""
    wire = {}
    for shapes, kind, start, _ in COLLECTIVE.findall(compiled.as_text()):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = math.prod(int(n) for n in shape.split(",") if n)
            # Asynchronous ones list operands and results: a whole array and an eighth.
            both = bool(start) and kind != "all-reduce"
            sent = (
                size
                * {
                    "all-reduce": 2 * 7 / 8,
                    "all-gather": 7 / 9 if both else 7 / 8,
                    "reduce-scatter": 7 / 9 if both else 7,
                }[kind]
            )
            wire.setdefault((kind, dtype), 0.0)
            wire[kind, dtype] += sent * BYTES.get(dtype, 4) / 2**20
    sizes = compiled.memory_analysis()
    return Traffic(
        {key: mib for key, mib in wire.items() if mib > 0.05},
        sizes.argument_size_in_bytes / 2**20,
    )


# ZeRO-1


@functools.cache
def master_weights_step(divided):
    target = "h100:8"
    tx = jaxmp.loss_scaling(jaxmp.master_weights(optax.adamw(1e-3)), "bf16-true")
    everywhere = NamedSharding(mesh(target), P())

    def step(params, state, tokens):
        loss, grads = jaxmp.value_and_grad(loss_fn)(params, tokens, loss_scale=state)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    params = weights(jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    over = "data" if divided else ()
    shardings = (
        jax.tree.map(lambda _: everywhere, params),
        state_shardings(state, params, everywhere, over=over),
    )
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    args = laid_out((params, state), shardings)
    return traffic(step.lower(*args, tokens_on(target)).compile())


def test_a_divided_state_needs_a_quarter_of_the_memory_and_no_more_traffic():
    whole, divided = master_weights_step(False), master_weights_step(True)
    assert divided.arguments == pytest.approx(8.8, abs=0.05)
    assert whole.arguments == pytest.approx(35.1, abs=0.05)
    assert set(divided.wire) == {("reduce-scatter", "bf16"), ("all-gather", "bf16")}
    assert divided.wire["reduce-scatter", "bf16"] == pytest.approx(4.38, abs=0.02)
    assert divided.wire["all-gather", "bf16"] == pytest.approx(4.38, abs=0.02)
    assert sum(divided.wire.values()) <= sum(whole.wire.values()) + 0.01


# FSDP by hand


def specs_of(params):
    return jax.tree.map(lambda x: P("data"), params)


@functools.cache
def shard_map_step(target, reduce_dtype):
    params = weights(jnp.float32)
    specs = specs_of(params)

    def loss_of_shards(shards, tokens):
        whole = gather_weights(
            shards, "data", specs=specs, reduce_dtype=reduce_dtype, mean=True
        )
        return loss_fn(whole, tokens)

    step = jax.shard_map(
        jax.grad(loss_of_shards),
        mesh=mesh(target),
        in_specs=(specs, P("data")),
        out_specs=specs,
    )
    shardings = jax.tree.map(lambda s: NamedSharding(mesh(target), s), specs)
    return jax.jit(step).lower(laid_out(params, shardings), tokens_on(target)).compile()


@pytest.mark.parametrize(("reduce_dtype", "mib"), [("float32", 13.14), (None, 8.76)])
def test_shards_are_gathered_in_half_and_reduced_as_asked(reduce_dtype, mib):
    wire = traffic(shard_map_step("h100:8", reduce_dtype)).wire
    reduced = "f32" if reduce_dtype else "bf16"
    assert set(wire) == {("all-gather", "bf16"), ("reduce-scatter", reduced)}
    assert sum(wire.values()) == pytest.approx(mib, abs=0.05)


@functools.cache
def explicit_step(target, reduce_dtype):
    kind = AxisType.Explicit

    def loss_of(w, x):
        w = gather_weights(w, "data", reduce_dtype=reduce_dtype)
        return jnp.mean((x.astype(w.dtype) @ w).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh(target, kind)):
        sharding = NamedSharding(mesh(target, kind), P("data", None))
        w, x = (
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
            for shape in ((1024, 512), (4096, 1024))
        )
        return jax.jit(jax.grad(loss_of)).lower(w, x).compile()


@pytest.mark.parametrize("reduce_dtype", ["float32", None])
def test_explicit_axes_gather_in_half_and_reduce_as_asked(reduce_dtype):
    wire = traffic(explicit_step("h100:8", reduce_dtype)).wire
    assert wire.pop(("all-gather", "bf16")) == pytest.approx(7 / 8, abs=0.01)
    ((kind, dtype),) = wire
    assert dtype == ("f32" if reduce_dtype else "bf16")
    assert kind in ("reduce-scatter", "all-reduce")


# Data parallel by hand


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "name"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_the_compilers_sum_in_the_dtype_asked_for(target, dtype, name):
    def gradient(w, x):
        w = replicated(w, "data")

        def loss(w):
            y = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
            return jnp.mean(y.astype(jnp.float32))

        return reduce_gradients(jax.grad(loss)(w), "data", dtype=dtype)

    step = jax.shard_map(
        gradient, mesh=mesh(target), in_specs=(P(), P("data")), out_specs=P()
    )
    w, x = (
        jax.ShapeDtypeStruct(
            (1024, 1024), jnp.float32, sharding=NamedSharding(mesh(target), spec)
        )
        for spec in (P(), P("data"))
    )
    text = jax.jit(step).lower(w, x).compile().as_text()
    sent = re.findall(r"= \(?(\w+)\[1024,1024\]\S* all-reduce(?:-start)?\(", text)
    assert sent == [name]
