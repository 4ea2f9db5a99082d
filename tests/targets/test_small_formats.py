"""What the chips' own compilers multiply in float8 and int8, and what is said of it."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxmp.report import chips, compile_step, target_devices
from jaxmp.report.hlo._contents import read_contents
from jaxmp.report.hlo._parse import read_hlo

pytestmark = pytest.mark.targets

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
ROWS, WIDTH = 512, 256


def multiply(x, w):
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    contract = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, preferred_element_type=wide)


def operands(dtype, size=WIDTH):
    return (jax.ShapeDtypeStruct((size, size), dtype),) * 2


def mlp():
    """The gradient of three layers; `python -m jaxmp report` takes this, too."""

    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.mean(x)

    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32) for _ in range(3)]
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    return jax.grad(loss), weights, x


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMP_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("dtype", "target", "told"),
    [
        (E4M3, "h100", "float16 (stored in float8_e4m3fn)"),
        (E4M3, "tpu-v5e", "bfloat16 (stored in float8_e4m3fn)"),
        (E4M3, "tpu7x", "float8_e4m3fn"),
        (jnp.int8, "h100", "int8"),
        (jnp.int8, "tpu-v5e", "int8"),
        (jnp.int8, "tpu7x", "bfloat16 (stored in int8)"),
    ],
)
def test_a_plain_dot_is_what_the_chip_multiplies(dtype, target, told):
    args = operands(dtype)
    (row,) = compile_step(multiply, *args, policies=["float32"], targets=[target]).rows
    assert list(row.contents.matmuls) == [told]
    assert row.contents.matmuls[told].amount == 2 * WIDTH**3


# The last layer is the head, which stays in half.
@pytest.mark.parametrize(
    ("policy", "target", "told"),
    [
        ("mixed_fp8", "h100", "float8_e4m3fn"),
        ("mixed_fp8", "tpu7x", "float8_e4m3fn"),
        ("mixed_fp8", "tpu-v5e", "bfloat16 (stored in float8_e4m3fn)"),
        ("mixed_int8", "tpu-v5e", "int8"),
        ("mixed_int8", "tpu7x", "bfloat16 (stored in int8)"),
    ],
)
def test_a_quantising_policy_multiplies_what_the_chip_can(policy, target, told):
    (row,) = compile_step(*mlp(), policies=[policy], targets=[target]).rows
    matmuls = row.contents.matmuls
    assert set(matmuls) == {told, "bfloat16"}
    # Of two layers: forward, the gradients of the weights, and one of an activation.
    assert matmuls[told].times == 5
    assert matmuls["bfloat16"].times == 3


TILES = [(16, 8, 2), (32, 128, 4), (64, 64, 2), (64, 16, 4), (128, 128, 8)]


@pytest.mark.parametrize("dtype", [E4M3, jnp.int8], ids=["float8", "int8"])
@pytest.mark.parametrize(("rows", "columns", "warps"), TILES)
def test_what_triton_multiplies_is_read_from_its_tile(
    dtype, rows, columns, warps, tmp_path
):
    device = jax.sharding.SingleDeviceSharding(target_devices("h100")[0])
    tile = f"block_m:{rows},block_n:{columns},block_k:64,split_k:1,num_stages:3"
    jitted = jax.jit(multiply, in_shardings=device, out_shardings=device)
    compiled = jitted.lower(*operands(dtype, 512)).compile(
        {
            "xla_gpu_override_gemm_autotuner": f"{tile},num_warps:{warps},num_ctas:1",
            "xla_dump_to": str(tmp_path),
        }
    )
    ptx = "".join(file.read_text() for file in tmp_path.glob("*.ptx"))
    (multiplied,) = set(re.findall(r"mma\S*\.(e4m3|s8|f16)\.(?:e4m3|s8|f16)", ptx))
    program = read_hlo(compiled.as_text())
    contents = read_contents(program, (), lambda *_: "", chips["h100"].units)
    (told,) = contents.matmuls
    kinds = {"float8_e4m3fn": "e4m3", "int8": "s8"}
    assert kinds.get(told, "f16") == multiplied
