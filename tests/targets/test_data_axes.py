"""`data_axes` on 8 H100s and on a v5e 2x4: what each device sends, in which dtype.

The model is a transformer of 2 layers, width 256 and vocabulary 2048, with a head of
its own: 2.62 million parameters. Figures are MiB that one device sends in a step of 4
micro-batches, if every collective is a ring.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.report import target_devices

pytestmark = pytest.mark.targets

WIDTH, VOCABULARY, LENGTH, HEADS, DEVICES = 256, 2048, 256, 4, 8
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}
TARGETS = ("h100:8", "tpu-v5e:8")


def parameters():
    def weight(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    block = {
        "qkv": weight(WIDTH, 3 * WIDTH),
        "out": weight(WIDTH, WIDTH),
        "up": weight(WIDTH, 4 * WIDTH),
        "down": weight(4 * WIDTH, WIDTH),
        "norms": [weight(WIDTH)] * 2,
    }
    tables = {"embedding": weight(VOCABULARY, WIDTH), "head": weight(WIDTH, VOCABULARY)}
    return {**tables, "blocks": [block] * 2}


def norm(x, gain):
    x = x.astype(jnp.float32)
    variance = jnp.mean(x * x, -1, keepdims=True)
    return (x * jax.lax.rsqrt(variance + 1e-6) * gain[None, None]).astype(jnp.bfloat16)


def loss_fn(params, tokens):
    def half(weight):
        return weight.astype(jnp.bfloat16)

    x = jnp.take(half(params["embedding"]), tokens, axis=0)
    for block in params["blocks"]:
        qkv = norm(x, block["norms"][0]) @ half(block["qkv"])
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, -1))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ half(block["out"])
        hidden = jax.nn.gelu(norm(x, block["norms"][1]) @ half(block["up"]))
        x = x + hidden @ half(block["down"])
    logits = (x @ half(params["head"])).astype(jnp.float32)[:, :-1]
    predicted = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(predicted, tokens[:, 1:, None], -1))


@functools.cache
def sent(target, is_sharded, **options):
    """MiB that one device sends, by kind and dtype of the collective."""
    mesh = Mesh(np.array(target_devices(target)), ("data",))

    def placed(shape):
        spec = P("data") if is_sharded and len(shape.shape) == 2 else P()
        return shape.update(sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(placed, parameters())
    rows = NamedSharding(mesh, P("data"))
    tokens = jax.ShapeDtypeStruct((32, LENGTH), jnp.int32, sharding=rows)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    if "data_axes" in options:
        options = {"grad_shardings": shardings, "mesh": mesh, **options}
    differentiate = jaxmp.value_and_grad(loss_fn, micro_batches=4, **options)

    def step(params, tokens):
        return differentiate(params, tokens, loss_scale=jaxmp.StaticLossScale(1024))

    outs = (NamedSharding(mesh, P()), shardings)
    compiled = jax.jit(step, out_shardings=outs).lower(params, tokens).compile()
    found = wire(compiled.as_text())
    print(f"MiB sent on {target}, sharded={is_sharded}, {sorted(options)}: {found}")
    return found


def wire(text):
    """Bytes of every collective, with the iterations of the loop it stands in."""
    computations = dict(
        re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    )
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M).group(1)
    found, seen = {}, set()

    def visit(name, times):
        for types, kind, rest in re.findall(
            r" = (.*?) ([a-z-]+)\((.*)$", computations[name], re.M
        ):
            kind = kind.removesuffix("-start")
            if kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
                count(name, times, types, kind, rest)
            elif kind == "while":
                visit(re.search(r"body=%?([\w.-]+)", rest).group(1), times * 4)
            else:
                for called in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", rest):
                    visit(called, times)

    def count(name, times, types, kind, rest):
        if kind == "all-gather":
            which = re.search(r"channel_id=(\d+)", rest).group(1), types.split("{")[0]
            if which in seen:  # a step of an asynchronous one on the TPU
                return
            seen.add(which)
        if types.startswith("(("):  # operands, then results
            types = types[types.index("), (") :]
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
        if kind == "all-gather" and len(arrays) == 2 and types.startswith("("):
            arrays = arrays[1:]  # an asynchronous one: the operand, then the result
        share = {"all-reduce": 2, "reduce-scatter": DEVICES}.get(kind, 1)
        if name.startswith("all-reduce-scatter"):  # the TPU's reduce-scatter
            kind, share = "reduce-scatter", 1
        for dtype, shape in arrays:
            size = BYTES[dtype] * np.prod([int(n) for n in shape.split(",") if n])
            moved = times * size * share * (DEVICES - 1) / DEVICES / 2**20
            found[kind, dtype] = found.get((kind, dtype), 0) + moved

    visit(entry, 1)
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "name", "goal"),
    [
        ("bfloat16", "bf16", 8.8),
        ("float32", "f32", 17.6),
    ],
)
def test_data_parallel_reduces_once(target, dtype, name, goal):
    found = sent(target, False, data_axes="data", reduce_dtype=dtype)
    assert sum(found.values()) <= goal
    assert found["all-reduce", name] > 0.99 * sum(found.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "name", "goal"),
    [
        ("bfloat16", "bf16", 8.8),
        ("float32", "f32", 13.2),
    ],
)
def test_sharded_weights_are_gathered_and_reduced_once(target, dtype, name, goal):
    options = {"data_axes": "data", "reduce_dtype": dtype, "gather": "window"}
    found = sent(target, True, **options)
    assert sum(found.values()) <= goal
    assert found["all-gather", "bf16"] == pytest.approx(4.375, rel=0.01)
    scattered = found["reduce-scatter", name]
    assert scattered == pytest.approx(2.1875 * BYTES[name], rel=0.01)


@pytest.mark.parametrize("target", TARGETS)
def test_without_data_axes_every_micro_batch_reduces(target):
    assert sum(sent(target, False).values()) >= 35


def test_gathers_of_every_micro_batch_are_in_half_too():
    found = sent("h100:8", True, data_axes="data", gather="micro_batch")
    assert found["all-gather", "bf16"] == pytest.approx(4 * 4.375, rel=0.01)
    assert found["reduce-scatter", "f32"] == pytest.approx(8.75, rel=0.01)
