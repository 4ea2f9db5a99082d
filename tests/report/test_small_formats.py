"""Float8 and int8: which devices multiply them, and what is said of the others."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jaxmp
from jaxmp.cli import main
from jaxmp.errors import PolicyError, UnknownTarget
from jaxmp.report import audit, check_policy, chips
from jaxmp.report.compile.chips import Units, units_of
from jaxmp.report.compile.known_devices import known_device
from jaxmp.report.compile.payoffs import CYCLE_ESTIMATES, payoff_sentence, payoffs
from jaxmp.report.hlo._contents import read_contents
from jaxmp.report.hlo._parse import read_hlo
from jaxmp.report.hlo._roofline import roofline

DOCS = Path(jaxmp.__file__).parent.parent / "docs"
BOTH, NEITHER = {"float8", "int8"}, set()


def device(kind, platform="gpu", capability=None):
    return SimpleNamespace(
        device_kind=kind, platform=platform, compute_capability=capability
    )


# Which devices do


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("h100", BOTH),
        ("l4", BOTH),
        ("a100", {"int8"}),
        ("t4", {"int8"}),
        ("v100", NEITHER),
        ("tpu-v4", NEITHER),
        ("tpu-v5e", {"int8"}),
        ("tpu-v5p", {"int8"}),
        ("tpu-v6e", {"int8"}),
        ("tpu7x", {"float8"}),
    ],
)
def test_a_chip_multiplies_what_has_a_peak_of_its_own(name, formats):
    chip = chips[name]
    assert chip.units == Units("tpu" if "tpu" in name else "gpu", frozenset(formats))
    half = max(chip.matmul_rate("bfloat16"), chip.matmul_rate("float16"))
    for dtype in ("float8_e4m3fn", "float8_e5m2", "int8"):
        is_faster = chip.matmul_rate(dtype) > 1.5 * half
        assert is_faster == (dtype.partition("_")[0] in formats), dtype


@pytest.mark.parametrize(
    ("kind", "capability", "formats"),
    [
        ("NVIDIA H200", "9.0", BOTH),
        ("NVIDIA GeForce RTX 4090", "8.9", BOTH),
        ("NVIDIA L40S", "8.9", BOTH),
        ("NVIDIA B200", "10.0", BOTH),
        ("NVIDIA GeForce RTX 5090", "12.0", BOTH),
        ("NVIDIA A10G", "8.6", {"int8"}),
        ("Quadro RTX 6000", "7.5", {"int8"}),
        ("Quadro GV100", "7.0", NEITHER),
    ],
)
def test_a_gpu_without_known_peaks_is_known_by_its_capability(
    kind, capability, formats
):
    assert units_of(device(kind, "gpu", capability)).formats == formats


def test_nothing_is_said_of_devices_that_are_unknown():
    unknown = device("AMD Instinct MI300X", "gpu", "gfx942")
    assert units_of(unknown) is None
    assert units_of(device("TPU v3", "tpu")) is None
    told = "It is unknown whether AMD Instinct MI300X multiplies int8."
    assert check_policy("mixed_int8", unknown) == told


@pytest.mark.cpu
def test_a_cpu_multiplies_neither():
    assert units_of(jax.local_devices()[0]).formats == NEITHER


# What a policy asks for


@pytest.mark.parametrize(
    ("policy", "target", "told"),
    [
        ("mixed_fp8", "tpu-v5e", "saves bytes and no time; write mixed_int8."),
        ("mixed_fp8", "tpu-v6e:8", "saves bytes and no time; write mixed_int8."),
        ("mixed_fp8", "a100", "saves bytes and no time; write mixed_int8."),
        ("mixed_int8:wgrad_half", "tpu7x", "saves bytes and no time; write mixed_fp8."),
        ("mixed_fp8", "tpu-v4", "mixed_fp8 saves bytes and no time."),
        ("mixed_int8", "v100", "mixed_int8 saves bytes and no time."),
        ("mixed_int8", "cpu", "mixed_int8 saves bytes and no time."),
        ("compute=f16,quantize=fp8:hybrid", "t4", "; write mixed_int8."),
    ],
)
def test_a_policy_that_a_device_does_not_multiply_is_named(policy, target, told):
    found = check_policy(policy, target)
    assert found.endswith(told)
    name = "int8" if "int8" in policy else "float8"
    assert found.startswith(f"{known_device(target).name} does not multiply {name}: ")


@pytest.mark.parametrize(
    ("policy", "target"),
    [
        ("mixed_fp8:rowwise", "h100"),
        ("mixed_fp8", "tpu7x"),
        ("mixed_int8", "h100:8"),
        ("mixed_int8", "tpu-v5e"),
        ("mixed_bfloat16", "tpu-v4"),
        ("float32", "cpu"),
    ],
)
def test_a_policy_that_a_device_multiplies_is_fine(policy, target):
    assert check_policy(policy, target) == ""


@pytest.mark.cpu
def test_the_first_local_device_is_asked_by_default():
    assert check_policy("mixed_fp8").startswith(jax.local_devices()[0].device_kind)
    assert check_policy("mixed_fp8") == check_policy("mixed_fp8", jax.devices()[0])


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(UnknownTarget, match="There is no target 'tpu-v9'"):
        check_policy("mixed_fp8", "tpu-v9")
    with pytest.raises(PolicyError, match="mixed_fp9"):
        check_policy("mixed_fp9", "h100")


# Doctor and policy say it


def test_doctor_says_what_a_device_multiplies(capsys):
    command = ["doctor", "--policy", "mixed_int8", "--fail-on", "not-native"]
    assert main([*command, "--target", "tpu-v5e", "--target", "l4"]) == 0
    text = capsys.readouterr().out
    assert "TPU v5e multiplies int8: mixed_int8 takes 1.53x the time of" in text
    assert "NVIDIA L4 multiplies int8.\n" in text
    assert "small models get slower" in text
    assert main([*command, "--target", "tpu7x", "--json"]) == 1
    printed = capsys.readouterr()
    (note,) = (x for x in json.loads(printed.out)["notes"] if "TPU7x" in x)
    assert note == check_policy("mixed_int8", "tpu7x")
    assert "found not-native" in printed.err


@pytest.mark.cpu
def test_doctor_says_which_policies_are_native_here(capsys):
    main(["doctor", "--json"])
    (found,) = json.loads(capsys.readouterr().out)["devices"]
    assert found["multiplies"] == []
    main(["doctor"])
    text = capsys.readouterr().out
    assert re.search("mixed_fp8 +mixed_int8", text)
    assert "small models get slower" not in text
    assert main(["doctor", "--policy", "mixed_fp8", "--fail-on", "not-native"]) == 1


def test_policy_says_where_its_matmuls_are_native(capsys):
    main(["policy", "mixed_fp8:rowwise", "--json"])
    found = json.loads(capsys.readouterr().out)["matmuls with weights"]
    assert found == "float8 on tpu7x and NVIDIA GPUs from Ada on; half elsewhere"
    main(["policy", "mixed_bfloat16", "--json"])
    assert "matmuls with weights" not in json.loads(capsys.readouterr().out)


# From which width it pays


def test_a_payoff_names_a_chip_with_units_and_a_source():
    for payoff in payoffs:
        assert check_policy(payoff.policy, payoff.chip) == ""
        assert payoff.source
        assert payoff_sentence(chips[payoff.chip], payoff.policy).endswith(")")
    assert payoff_sentence(chips["tpu-v4"], "mixed_fp8") == ""


def test_the_page_has_the_table_of_payoffs():
    page = (DOCS / "will_half_help.md").read_text()
    for x in payoffs:
        row = f"| `{x.chip}` | `{x.policy}` | {x.width} | {x.time:.2f}x |"
        assert row in page, row
    assert len(re.findall(r"\| `mixed_\w+` \| \d+ \| [\d.]+x \|", page)) == len(payoffs)
    assert " ".join(page.split()).count(CYCLE_ESTIMATES) == 1


def test_the_page_has_the_table_of_units():
    page = (DOCS / "will_half_help.md").read_text()
    for name, chip in chips.items():
        marks = ("yes" if x in chip.units.formats else "no" for x in ("float8", "int8"))
        assert f"| `{name}` | {' | '.join(marks)} |" in page


# Compiled programs

TRITON = """HloModule jit_dot

%gemm_fusion (x: {dtype}[256,512], w: {dtype}[512,128]) -> {wide}[256,128] {{
  %x = {dtype}[256,512]{{1,0}} parameter(0)
  %w = {dtype}[512,128]{{1,0}} parameter(1)
  ROOT %dot.1 = {wide}[256,128]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

ENTRY %main (a: {dtype}[256,512], b: {dtype}[512,128]) -> {wide}[256,128] {{
  %a = {dtype}[256,512]{{1,0}} parameter(0)
  %b = {dtype}[512,128]{{1,0}} parameter(1)
  ROOT %out = {wide}[256,128]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%gemm_fusion, backend_config={{"fusion_backend_config":{{"kind":"{kind}","block_level_fusion_config":{{"num_warps":"{warps}","output_tiles":[{{"sizes":[{tile}]}}]}}}}}}
}}
"""  # noqa: E501

LIBRARY = """HloModule jit_dot

ENTRY %main (a: {dtype}[256,512], b: {dtype}[512,128]) -> {wide}[256,128] {{
  %a = {dtype}[256,512]{{1,0}} parameter(0)
  %b = {dtype}[512,128]{{1,0}} parameter(1)
  %one = f32[] constant(1)
  %gemm = ({wide}[256,128]{{1,0}}, s8[4194304]{{0}}) custom-call(%a, %b, %one, %one), custom_call_target="{target}", backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}}}}
  ROOT %out = {wide}[256,128]{{1,0}} get-tuple-element(%gemm), index=0
}}
"""  # noqa: E501

ON_TPU = """HloModule jit_dot

ENTRY %main (a: {dtype}[256,512], b: {dtype}[512,128]) -> {wide}[256,128] {{
  %a = {dtype}[256,512]{{1,0:T(8,128)(4,1)}} parameter(0)
  %b = {dtype}[512,128]{{1,0:T(8,128)(4,1)}} parameter(1)
  ROOT %out = {wide}[256,128]{{1,0:T(8,128)}} convolution(%a, %b), dim_labels=bf_io->bf
}}
"""

PLAIN = """HloModule jit_dot

ENTRY %main (a: {dtype}[256,512], b: {dtype}[512,128]) -> {wide}[256,128] {{
  %a = {dtype}[256,512]{{1,0}} parameter(0)
  %b = {dtype}[512,128]{{1,0}} parameter(1)
  ROOT %out = {wide}[256,128]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""  # noqa: E501

E4M3 = {"dtype": "f8e4m3fn", "wide": "f32"}
E5M2 = {"dtype": "f8e5m2", "wide": "f32"}
INT8 = {"dtype": "s8", "wide": "s32"}
WARP_GROUP = {"kind": "__triton_nested_gemm_fusion", "warps": 4, "tile": '"64","32"'}
SMALL_TILE = {**WARP_GROUP, "warps": 2, "tile": '"16","8"'}
FEW_ROWS = {**WARP_GROUP, "tile": '"32","128"'}
FEW_WARPS = {**WARP_GROUP, "warps": 2}
FLOAT8_CALL = {"target": "__cublas$lt$matmul$f8"}
CALL = {"target": "__cublas$lt$matmul"}
FLOPS = 2 * 256 * 512 * 128


def matmuls(text, units):
    return read_contents(read_hlo(text), (), lambda *_: "", units).matmuls


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        (TRITON.format(**E4M3, **SMALL_TILE), "h100", "float16 (stored in {})"),
        (TRITON.format(**E5M2, **FEW_ROWS), "h100", "float16 (stored in {})"),
        (TRITON.format(**E4M3, **FEW_WARPS), "h100", "float16 (stored in {})"),
        (TRITON.format(**E4M3, **WARP_GROUP), "h100", "{}"),
        (TRITON.format(**E4M3, **WARP_GROUP), "a100", "float16 (stored in {})"),
        (TRITON.format(**INT8, **SMALL_TILE), "h100", "{}"),
        (TRITON.format(**INT8, **SMALL_TILE), "v100", "float16 (stored in {})"),
        (LIBRARY.format(**E4M3, **FLOAT8_CALL), "h100", "{}"),
        (LIBRARY.format(**E4M3, **CALL), "h100", "float16 (stored in {})"),
        (LIBRARY.format(**INT8, **CALL), "t4", "{}"),
        (LIBRARY.format(**INT8, **CALL), "v100", "float16 (stored in {})"),
        (PLAIN.format(**E4M3), "h100", "float16 (stored in {})"),
        (PLAIN.format(**INT8), "h100", "float16 (stored in {})"),
        (ON_TPU.format(**E4M3), "tpu7x", "{}"),
        (ON_TPU.format(**E4M3), "tpu-v6e", "bfloat16 (stored in {})"),
        (ON_TPU.format(**E5M2), "tpu-v5e", "bfloat16 (stored in {})"),
        (ON_TPU.format(**INT8), "tpu-v5e", "{}"),
        (ON_TPU.format(**INT8), "tpu-v5p", "{}"),
        (ON_TPU.format(**INT8), "tpu-v6e", "{}"),
        (ON_TPU.format(**INT8), "tpu7x", "bfloat16 (stored in {})"),
        (ON_TPU.format(**INT8), "tpu-v4", "bfloat16 (stored in {})"),
    ],
)
def test_a_matmul_is_called_what_is_multiplied(text, name, told):
    chip = chips[name]
    ((found, total),) = matmuls(text, chip.units).items()
    dtype = next(x for x in ("float8_e4m3fn", "float8_e5m2", "int8") if found.count(x))
    assert found == told.format(dtype)
    assert (total.times, total.amount) == (1, FLOPS)
    # The estimate is made of the same dtype.
    fast = chip._replace(bandwidth=1e30, calibration=None)
    multiplied = found.partition(" ")[0]
    seconds = roofline(read_hlo(text), fast).matmul_cost / fast.bandwidth
    assert seconds == pytest.approx(FLOPS / chip.matmul_rate(multiplied))


def test_a_fusion_with_another_shape_than_its_matmul_has_an_unknown_tile():
    text = TRITON.format(**E4M3, **WARP_GROUP)
    turned = text.replace("ROOT %out = f32[256,128]", "ROOT %out = f32[128,256]")
    assert turned != text
    (told,) = matmuls(turned, chips["h100"].units)
    assert told == "float16 (stored in float8_e4m3fn)"


def test_a_cpu_never_multiplies_a_small_format():
    units = Units("cpu", frozenset())
    assert list(matmuls(PLAIN.format(**INT8), units)) == ["int32 (stored in int8)"]
    (told,) = matmuls(PLAIN.format(**E4M3), units)
    assert told == "float32 (stored in float8_e4m3fn)"


def test_a_float8_call_is_known_without_knowing_the_gpu():
    units = Units("gpu", frozenset())
    assert list(matmuls(LIBRARY.format(**E4M3, **FLOAT8_CALL), units)) == [
        "float8_e4m3fn"
    ]


def test_what_is_not_small_stays_what_it_is():
    text = PLAIN.format(dtype="bf16", wide="f32")
    assert list(matmuls(text, chips["h100"].units)) == ["bfloat16"]


# Traced programs


def test_an_audit_counts_quantised_matmuls_and_calls_them_operands():
    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.mean(x)

    def step(policy):
        return jax.grad(jaxmp.autocast(loss, policy))

    weights = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 3
    x = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    half = audit(step("mixed_bfloat16"), weights, x, policy="mixed_bfloat16")
    small = audit(step("mixed_fp8"), weights, x, policy="mixed_fp8")
    assert small.flops == half.flops == (3 * 3 - 1) * 2 * 512 * 256**2
    quantised = [m for m in small.matmuls if m.is_quantized]
    assert len(quantised) == 5
    assert {m.operands for m in quantised} == {("float8_e4m3fn", "float8_e4m3fn")}
    assert {m.is_backward for m in quantised} == {True, False}
    assert small.quantized_flops == 5 / 8
    assert "100.0% in half, 62.5% in a smaller format" in small.summary
    assert "smaller" not in half.summary
    assert not small.kinds
