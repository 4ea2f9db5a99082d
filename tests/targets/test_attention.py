"""Fused attention written in float32, under autocast, as the compilers emit it.

Both compilers show what the kernels are given; what these compute needs the machines.
"""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

import jaxmp
from jaxmp.report import compile_for

pytestmark = pytest.mark.targets

BATCH, HEADS, LENGTH, DEPTH = 2, 4, 256, 64
W = jax.ShapeDtypeStruct((HEADS * DEPTH, HEADS * DEPTH), jnp.float32)
X = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS * DEPTH), jnp.float32)


def flash(q, k, v):
    return flash_attention(q, k, v, causal=True, sm_scale=DEPTH**-0.5)


def splashed(q, k, v):
    masks = splash.MultiHeadMask([splash.CausalMask((LENGTH, LENGTH))] * HEADS)
    kernel = splash.make_splash_mha_single_device(masks)
    return jax.vmap(kernel)(q * DEPTH**-0.5, k, v)


def cudnn(q, k, v):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return jnp.swapaxes(out, 1, 2)


def loss(attend, w, x):
    q, k, v = (
        jnp.swapaxes((x @ (s * w)).reshape(BATCH, LENGTH, HEADS, DEPTH), 1, 2)
        for s in (1, 2, 3)
    )
    out = jnp.swapaxes(attend(q, k, v), 1, 2).reshape(x.shape)
    return jnp.mean((out @ w) ** 2)


def kernels(target, fn):
    """For each kernel of a program: the dtypes of all that has a query's shape."""
    text = compile_for(target, fn, W, X).as_text()
    shape = re.compile(r"(bf16|f16|f32)\[(\d+),(\d+),(\d+),(\d+)\]")
    found = []
    for line in text.splitlines():
        if "tpu_custom_call" in line or "__cudnn$fmha" in line:
            line = re.split(r"metadata=|backend_config=", line)[0]
            sizes = {BATCH, HEADS, LENGTH, DEPTH}
            found.append(
                {d for d, *size in shape.findall(line) if set(map(int, size)) == sizes}
            )
    return found


@pytest.mark.parametrize(
    ("target", "attend", "half"),
    [
        ("tpu-v5e", flash, "bf16"),
        ("tpu-v5e", splashed, "bf16"),
        ("h100", cudnn, "bf16"),
        ("h100", cudnn, "f16"),
    ],
)
def test_kernels_of_float32_code_get_half(target, attend, half, monkeypatch):
    # JAX asks for the version of cuDNN while it traces, and there is none here.
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)
    policy = {"bf16": "mixed_bfloat16", "f16": "mixed_float16"}[half]
    fn = functools.partial(loss, attend)
    found = kernels(target, jax.grad(jaxmp.autocast(fn, policy)))
    assert len(found) >= 2, "a forward and a backward kernel"
    assert all(dtypes == {half} for dtypes in found)


@pytest.mark.parametrize("attend", [flash, splashed])
def test_kernels_for_tpus_stay_in_float32_under_a_float16_policy(attend):
    fn = functools.partial(loss, attend)
    found = kernels("tpu-v5e", jax.grad(jaxmp.autocast(fn, "mixed_float16")))
    assert all(dtypes == {"f32"} for dtypes in found)


def test_without_autocast_the_same_code_computes_in_float32():
    assert kernels("tpu-v5e", jax.grad(functools.partial(loss, flash)))[0] == {"f32"}
