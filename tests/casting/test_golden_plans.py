"""Golden files: what is decided about five functions, so that a change is seen.

`JAXMP_UPDATE_PLANS=1 pytest tests/casting/test_golden_plans.py` rewrites them.
"""

import difflib
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxmp

PLANS = pathlib.Path(__file__).parent / "plans"
UPDATE = "JAXMP_UPDATE_PLANS"
# What calls are named by one release of JAX or the next, and helpers inside of JAX that
# a release has and another has not.
CALLS = {"pjit": "jit", "checkpoint": "remat", "remat2": "remat"}


def cross_entropy(logits, labels):
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def layer_norm(x, scale):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def transformer_block(w, x, labels):
    """Pre-norm, causal, with a loss."""
    with jax.named_scope("attention"):
        h = layer_norm(x, w["scale"][0, None])
        q, k, v = (jnp.einsum("td,dhk->htk", h, w[name]) for name in "qkv")
        scores = jnp.einsum("hqk,htk->hqt", q, k) / 2.0
        causal = jnp.tril(jnp.ones(scores.shape[1:], bool))[None]
        shares = jax.nn.softmax(jnp.where(causal, scores, -1e30))
        x = x + jnp.einsum("hqt,htk,hkd->qd", shares, v, w["out"])
    with jax.named_scope("mlp"):
        h = layer_norm(x, w["scale"][1, None])
        x = x + jax.nn.gelu(h @ w["up"]) @ w["down"]
    with jax.named_scope("head"):
        return cross_entropy(layer_norm(x, w["scale"][2, None]) @ w["head"], labels)


def batch_norm_cnn(w, images, labels):
    """A convolution, its BatchNorm with running statistics, and a loss."""
    dims = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(images, w["conv"], (1, 1), "SAME", None, None, dims)
    mean = jnp.mean(x, (0, 1, 2), keepdims=True)
    var = jnp.mean(x * x, (0, 1, 2), keepdims=True) - mean * mean
    x = (x - mean) * (lax.rsqrt(var + 1e-5) * w["scale"]) + w["bias"]
    x = jnp.maximum(x, 0)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    loss = cross_entropy(x.reshape(len(x), -1) @ w["head"], labels)
    return loss, 0.9 * w["mean"] + 0.1 * mean


def lstm(w, xs):
    """A scan whose carry is the cell and the hidden state."""

    def cell(carry, x):
        c, h = carry
        i, f, g, o = jnp.split(x @ w["x"] + h @ w["h"], 4, axis=-1)
        c = lax.logistic(f) * c + lax.logistic(i) * jnp.tanh(g)
        h = lax.logistic(o) * jnp.tanh(c)
        return (c, h), h

    zeros = jnp.zeros((xs.shape[1], w["h"].shape[0]))
    (_, last), hs = lax.scan(cell, (zeros, zeros), xs)
    return last @ w["head"], jnp.mean(hs * hs)


def routing(w, x):
    """Two of four experts for each token, and the loss that balances them."""
    with jax.named_scope("router"):
        shares = jax.nn.softmax(x @ w["router"])
        gates, chosen = lax.top_k(shares, 2)
        gates = gates / jnp.sum(gates, -1, keepdims=True)
    with jax.named_scope("experts"):
        h = jnp.maximum(jnp.einsum("td,edf->tef", x, w["up"]), 0)
        y = jnp.einsum("tef,efd->ted", h, w["down"])
    y = jnp.take_along_axis(y, chosen[..., None], axis=1)
    load = jnp.mean(jax.nn.one_hot(chosen, 4), (0, 1))
    return x + jnp.sum(y * gates[..., None], 1), jnp.sum(load * jnp.mean(shares, 0))


def tied_embedding(w, tokens):
    """The table is looked up, and is the head too."""
    x = w["table"][tokens[:-1]] * 4.0
    x = x + jnp.tanh(x @ w["up"])
    return cross_entropy(x @ w["table"].T, tokens[1:])


def floats(**shapes):
    return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


HEAD = (8, 2, 4)
CASES = {
    transformer_block: (
        floats(
            scale=(3, 8),
            q=HEAD,
            k=HEAD,
            v=HEAD,
            out=(2, 4, 8),
            up=(8, 32),
            down=(32, 8),
            head=(8, 20),
        ),
        array(5, 8),
        array(5, dtype=jnp.int32),
    ),
    batch_norm_cnn: (
        floats(
            conv=(3, 3, 1, 4),
            scale=(1, 1, 1, 4),
            bias=(1, 1, 1, 4),
            mean=(1, 1, 1, 4),
            head=(64, 10),
        ),
        array(2, 8, 8, 1),
        array(2, dtype=jnp.int32),
    ),
    lstm: (floats(x=(3, 16), h=(4, 16), head=(4, 2)), array(6, 2, 3)),
    routing: (
        floats(router=(8, 4), up=(4, 8, 16), down=(4, 16, 8)),
        array(5, 8),
    ),
    tied_embedding: (
        floats(table=(20, 8), up=(8, 8)),
        array(6, dtype=jnp.int32),
    ),
}


def plan_of(fn):
    """What `explain` says, without what depends on source lines."""
    plan = jaxmp.explain(fn)(*CASES[fn])
    rows = plan.rows
    table = [("operation", "path", "before", "after", "class", "reason")]
    for row in rows:
        primitive, _, name = row.operation.partition(" ")
        operation = f"{CALLS.get(primitive, primitive)} {name}".strip()
        reason = re.sub(r"\bpjit\b", "jit", row.reason)
        table.append((operation, row.path, row.before, row.after, row.op_class, reason))
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    lines = ["  ".join(map(str.ljust, row, (*widths, 0))).rstrip() for row in table]
    lines += [str(backward._replace(source="")) for backward in plan.backward]
    return "\n".join([*lines, ""])


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_decisions_are_those_of_the_golden_file(fn):
    path = PLANS / f"{fn.__name__}.txt"
    actual = plan_of(fn)
    if os.environ.get(UPDATE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(actual)
    golden = path.read_text()
    diff = difflib.unified_diff(
        golden.splitlines(), actual.splitlines(), str(path), "as it is now", lineterm=""
    )
    assert actual == golden, "\n".join(
        [f"The plan changed. If it is meant, run with {UPDATE}=1.", *diff]
    )
