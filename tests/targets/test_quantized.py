"""What the H100's compiler makes of a network in float8, on one device and on eight."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxmp
from jaxmp.report import target_devices

pytestmark = pytest.mark.targets

LAYERS, WIDTH, ROWS = 3, 512, 4096
WEIGHTS = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * LAYERS
HEAD = jax.ShapeDtypeStruct((WIDTH, 64), jnp.float32)
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def loss(weights, head, x):
    for w in weights:
        x = x + jax.nn.gelu(x @ w)
    return jnp.square(x @ head).mean()


def program(policy, devices=1):
    """The text of the gradient of all weights, which lie divided over the devices."""
    grads = jax.grad(jaxmp.autocast(loss, policy), (0, 1))
    mesh = Mesh(np.array(target_devices(f"h100:{devices}")), ("data",))
    divided = NamedSharding(mesh, PartitionSpec("data"))
    jitted = jax.jit(grads, in_shardings=divided, out_shardings=divided)
    return jitted.lower(WEIGHTS, HEAD, X).compile().as_text()


@pytest.fixture(scope="module")
def float8():
    return program("mixed_fp8")


def kernels(text):
    entry = text[text.index("\nENTRY") :]
    return len(re.findall(r" (?:fusion|custom-call|copy|transpose)\(", entry))


def test_every_matmul_of_a_layer_is_one_of_cublaslt(float8):
    # The gradient of the input is not asked for.
    assert float8.count('custom_call_target="__cublas$lt$matmul$f8"') == 3 * LAYERS - 1
    dots = [line for line in float8.splitlines() if " dot(" in line]
    assert not [line for line in dots if "f8e4m3fn" in line]


def test_rounding_adds_few_kernels(float8):
    # Three operands, each with two for its largest number and one to round it.
    assert kernels(float8) - kernels(program("mixed_bfloat16")) <= 11 * LAYERS


def gathered(text):
    """Bytes that all devices bring together, by dtype."""
    sizes = {"f8e4m3fn": 1, "bf16": 2, "f32": 4}
    found = dict.fromkeys(sizes, 0)
    for results in re.findall(r" = (.*?) all-gather(?:-done)?\(", text):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", results):
            found[dtype] += sizes[dtype] * math.prod(map(int, shape.split(",")))
    return found


def test_divided_weights_are_gathered_in_float8():
    half, small = (
        gathered(program(policy, 8)) for policy in ("mixed_bfloat16", "mixed_fp8")
    )
    weights, head = LAYERS * WIDTH * WIDTH, WIDTH * 64
    assert half == {"f8e4m3fn": 0, "bf16": 2 * (weights + head), "f32": 0}
    assert small == {"f8e4m3fn": weights, "bf16": 2 * head, "f32": 0}
