"""The page of a real machine's times, written from records that are known."""

import machine_page
import pytest
from machine_programs import UPDATE
from machine_records import Machine, Record

H100 = Machine("NVIDIA H100", "gpu", "jax 0.11.2", "580.1")
TORCH = Machine("NVIDIA H100", "gpu", "torch 2.13")
GIB = 2**30


def record(way, ms, machine=H100, model="GPT-2 small", **fields):
    usual = {"shape": "8 x 1024 tokens, AdamW", "steps": 6, "options": "--a=1"}
    if machine == TORCH:
        usual["options"] = ""
    return Record(model, way, machine, ms=ms, **{**usual, **fields})


@pytest.fixture
def records():
    return [
        record("bfloat16 autocast", (30.0, 20.0, 50.0), planned=7 * GIB),
        record(
            "bfloat16 by hand",
            (40.0,),
            allocated=11 * GIB,
            trace_seconds=1.26,
            host_ms=1.75,
        ),
        record("float32", (60.0,)),
        record("float16 jmp", (), error="XlaRuntimeError: RESOURCE_EXHAUSTED"),
        record("bfloat16 autocast, fused attention", (20.0,), TORCH),
        record("clip + adamw", (2.0,), model=UPDATE, shape="124.4 M in float32"),
        record("loss_scaling", (2.1,), model=UPDATE, shape="124.4 M in float32"),
    ]


def cells(text, way):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {way} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_row_has_times_memory_and_ratios(records):
    text = machine_page.page_section(records)
    autocast = cells(text, "bfloat16 autocast")
    assert autocast == [
        "30.00",
        "20.00 to 50.00",
        "",
        "7.00",
        *[""] * 3,
        "0.75",
        "2.00",
    ]
    hand = cells(text, "bfloat16 by hand")
    assert hand[2:] == ["1.75", "", "11.00", "1.3", "", "1.00", "1.50"]
    assert cells(text, "float32")[-2:] == ["", "1.00"]
    assert text.index("| float32 ") < text.index("| bfloat16 by hand ")


def test_updates_are_compared_with_the_clip_alone(records):
    text = machine_page.page_section(records)
    assert cells(text, "loss_scaling, 124.4 M in float32")[-1] == "1.05"


def test_the_machine_the_batch_and_the_options_are_named(records):
    text = machine_page.page_section(records)
    assert "### On NVIDIA H100" in text
    assert "jax 0.11.2, driver 580.1." in text
    assert "Compiled with `--a=1`." in text
    assert "**GPT-2 small**: 8 x 1024 tokens, AdamW" in text


def test_pytorch_stands_beside_the_steps_of_its_device(records):
    text = machine_page.page_section(records)
    row = cells(text, "torch 2.13: bfloat16 autocast, fused attention")
    assert row[-2:] == ["0.50", "3.00"]
    assert text.count("### On") == 1
    assert machine_page.page_section(records[4:5]).count("torch 2.13: bfloat16") == 1


def test_what_failed_and_what_was_not_taken_is_said(records):
    text = machine_page.page_section(records)
    assert "- float16 jmp: XlaRuntimeError: RESOURCE_EXHAUSTED" in text
    assert "Not taken: GPT-2 small (bfloat16 jmp, bfloat16 apply_policy, " in text
    assert "ResNet-50 (all)" in text
    assert ", float16 jmp" not in text[text.index("Not taken") :]


def test_other_machines_have_tables_of_their_own(records):
    other = Machine("NVIDIA A100", "gpu", "jax 0.11.2")
    text = machine_page.page_section([*records, record("float32", (90.0,), other)])
    first, second = text.split("### On NVIDIA A100")
    assert cells(first, "float32")[0] == "60.00"
    assert cells(second, "float32")[0] == "90.00"
    assert "torch" not in second


def test_a_cpu_has_no_place_on_the_page_and_tiny_programs_neither(records):
    cpu = Machine("cpu", "cpu", "jax 0.11.2")
    with pytest.raises(ValueError, match="float32 was timed on a CPU"):
        machine_page.page_section([*records, record("float32", (1.0,), cpu)])
    tiny = [record("float32", (1.0,), tiny=True)]
    assert machine_page.page_section(tiny) == machine_page.NOTHING
    assert "emulates half precision" in machine_page.tables(
        [record("float32", (1.0,), cpu)]
    )
