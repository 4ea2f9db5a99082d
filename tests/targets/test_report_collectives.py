"""What eight H100s and eight v5es send in a step of a small transformer, under FSDP."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmp.report import compile_step

pytestmark = pytest.mark.targets

WIDTH, WORDS, HEADS, LAYERS, DEVICES = 256, 2048, 4, 2, 8
MESH = AbstractMesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
SHAPES = {"table": (WORDS, WIDTH), "head": (WIDTH, WORDS)}
for i in range(LAYERS):
    SHAPES |= {f"{i}/{name}": (WIDTH, WIDTH) for name in "qkvo"}
    SHAPES |= {f"{i}/up": (WIDTH, 4 * WIDTH), f"{i}/down": (4 * WIDTH, WIDTH)}
MIB = 2**20
# All weights in bfloat16: 2.62 million of them.
WEIGHTS = 2 * sum(a * b for a, b in SHAPES.values())


def norm(x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)
    return y.astype(jnp.bfloat16)


def attention(h, q, k, v):
    q, k, v = ((h @ w).reshape(*h.shape[:2], HEADS, -1) for w in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / 8
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    shares = jax.nn.softmax(jnp.where(causal, scores, -1e9)).astype(jnp.bfloat16)
    return jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(h.shape)


def forward(params, tokens):
    w = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    x = w["table"][tokens]
    for i in range(LAYERS):
        q, k, v, o = (w[f"{i}/{name}"] for name in "qkvo")
        x = x + attention(norm(x), q, k, v) @ o
        x = x + jax.nn.gelu(norm(x) @ w[f"{i}/up"]) @ w[f"{i}/down"]
    return norm(x) @ w["head"]


def loss(params, tokens):
    logits = forward(params, tokens).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return losses.mean()


def fully_sharded():
    """A step and its arguments, each divided over eight devices by its first axis."""
    optimizer = optax.adamw(1e-3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def divided(x):
        spec = P("data") if x.ndim else P()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(MESH, spec)
        )

    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()}
    tokens = jax.ShapeDtypeStruct((32, 256), jnp.int32)
    state = jax.eval_shape(optimizer.init, params)
    return (step, *jax.tree.map(divided, (params, state, tokens)))


def compiled_for(target, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXMP_CACHE_DIR", str(folder))
        (row,) = compile_step(
            *fully_sharded(), policies=["float32"], targets=[target]
        ).rows
    lines = {str(finding.source) for finding in row.findings}
    assert {finding.kind for finding in row.findings} == {"reduced-in-half"}
    assert all("test_report_collectives.py" in line for line in lines)
    assert {one.group for one in row.contents.collectives} == {DEVICES}
    return {(one.kind, one.dtype): one for one in row.contents.collectives}


def test_eight_h100s_gather_every_weight_once(tmp_path):
    found = compiled_for("h100:8", tmp_path)
    gather = found.pop(("all-gather", "bfloat16"))
    scatter = found.pop(("reduce-scatter", "bfloat16"))
    assert gather.times == scatter.times == len(SHAPES) == 14
    assert gather.bytes == scatter.bytes == WEIGHTS
    assert gather.wire == scatter.wire == WEIGHTS * 7 / 8
    assert round(gather.wire / MIB, 2) == 4.38
    # The mean of the loss.
    (rest,) = found.values()
    assert (rest.kind, rest.dtype, rest.bytes) == ("all-reduce", "float32", 4)


def test_eight_v5es_gather_some_weights_again_and_pass_sums_on(tmp_path):
    found = compiled_for("tpu-v5e:8", tmp_path)
    gather = found["all-gather", "bfloat16"]
    assert gather.times == 23
    assert round(gather.wire / MIB, 2) == 6.02
    # The gradient of the table; the others are sums that eight devices pass on in a
    # loop of two iterations with four permutes, and once more after it.
    scatter = found["reduce-scatter", "bfloat16"]
    assert (scatter.times, scatter.bytes) == (1, 2 * WORDS * WIDTH)
    permute = found["collective-permute", "bfloat16"]
    assert permute.times == 13 * (2 * 4 + 1)
    assert permute.wire == (WEIGHTS - scatter.bytes) / 8 * 9
