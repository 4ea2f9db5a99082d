"""The page of the memory table, written from rows that are known."""

import compiled_steps
import jax
import memory_page
import memory_table
import pytest

from jaxmp.report import StepReport
from jaxmp.report._rows import Row
from jaxmp.report.hlo._liveness import LiveBuffers
from jaxmp.report.hlo._roofline import Roofline

GIB = 2**30


def row(way, target="h100", *, peak, accessed=None, seconds=0.01, buffers=()):
    cost = 1e12 * seconds
    roofline = Roofline(cost, cost / 2, 0.0, 0.0, 1e12, 1e9, 100, seconds)
    if target != "h100":
        roofline = roofline._replace(seconds=None)
    return Row(
        way,
        target,
        fits=peak is not None,
        memory=80 * GIB,
        peak=peak and int(peak * GIB),
        accessed=accessed and accessed * GIB,
        roofline=roofline if peak else None,
        buffers=buffers,
    )


BUFFER = LiveBuffers(
    2**21, 3, "bf16[8,8]", "jit(step)/block_0/dot", "/a/model.py:7 (f)"
)


@pytest.fixture
def rows():
    xl, bert = "Transformer-XL base", "BERT-Base"
    autocast = "bfloat16 autocast"
    return {
        (bert, "float32", "h100"): row("float32", peak=20, seconds=0.02),
        (bert, autocast, "h100"): row(autocast, peak=10),
        (bert, "bfloat16 apply_policy", "h100"): row("", peak=12),
        (xl, "float32", "h100"): row("float32", peak=10),
        (xl, autocast, "h100"): row(autocast, peak=6, buffers=(BUFFER,)),
        (bert, "float32", "tpu-v5e"): row("float32", "tpu-v5e", peak=None),
        (bert, autocast, "tpu-v5e"): row(autocast, "tpu-v5e", peak=9, accessed=7),
        (xl, "float32", "tpu-v5e"): row("float32", "tpu-v5e", peak=8, accessed=40),
        (xl, autocast, "tpu-v5e"): row(autocast, "tpu-v5e", peak=6, accessed=10),
    }


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_the_headline_says_what_is_reached_and_by_how_much_not(rows):
    table = memory_page.headline(rows)
    (bert,) = lines_with(table, "BERT-Base")
    assert [cell.strip() for cell in bert.strip("|").split("|")] == [
        "BERT-Base",
        "47.0 %",
        "",
        "50.0 % (autocast)",
        "yes",
        "1.6",
        "",
        "2.00",
    ]
    (xl,) = lines_with(table, "Transformer-XL base")
    assert "40.0 % (autocast)" in xl
    assert "no, by 12.0 points" in xl


def test_only_a_chip_that_was_timed_has_milliseconds(rows):
    found = memory_page.rows_of(rows, "BERT-Base", "h100")
    table = memory_page.table(found)
    assert lines_with(table, "ms (estimate*)", "speed-up*")
    assert lines_with(table, "bfloat16 autocast", " 10.0 |", " 2.00 |")
    found = memory_page.rows_of(rows, "Transformer-XL base", "tpu-v5e")
    table = memory_page.table(found)
    assert "ms" not in table.splitlines()[0]
    assert lines_with(table, "bfloat16 autocast", " 75.0 % |", " 1.00 |")


def test_the_buffers_of_what_is_not_reached_are_shown(rows):
    assert memory_page.shortfall(rows, "BERT-Base") == []
    _, table = memory_page.shortfall(rows, "Transformer-XL base")
    (line,) = lines_with(table, "bf16[8,8]")
    assert "`block_0/dot` (model.py:7)" in line
    assert line.startswith("|   2 |")


def test_what_does_not_fit_or_was_not_compiled_is_said(rows):
    rows["GPT-2 small", "float32", "h100"] = row("float32", peak=18)
    text = memory_page.page_section(rows, {"memory": "a.svg", "traffic": "b.svg"})
    assert lines_with(text, "float32", "does not fit")
    assert "Nothing can be compared with float32, which does not fit." in text
    assert "Not compiled for this page: bfloat16 by hand" in text
    assert text.count("Nothing was compiled for TPU v5e.") == 1
    assert "xla_gpu_enable_triton_gemm=False" in text
    (traffic,) = lines_with(text, "bfloat16 autocast", "10.0", "75.0 %")
    assert "25.0 %" in traffic


def test_the_page_and_its_charts_are_the_same_each_time(rows, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- memory -->\n<!-- end of memory -->\n")
    written = []
    for _ in range(2):
        memory_table.write(rows, page)
        written.append({p.name: p.read_bytes() for p in tmp_path.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"page.md", "page_memory.svg", "page_traffic.svg"}
    assert b"<svg" in written[0]["page_memory.svg"]


# What is compiled


def test_padding_is_switched_off_where_the_table_says_so():
    options = compiled_steps.compiler_options
    model = "Transformer-XL base"
    assert options("BERT-Base", "float32", "h100") == {}
    assert options(model, "float32", "tpu-v5e") == {}
    assert options(model, "float32", "h100") == {"xla_gpu_enable_triton_gemm": False}
    way = "bfloat16 autocast, not padded"
    assert set(options(model, way, "h100")) == {
        "xla_gpu_enable_triton_gemm",
        "xla_disable_hlo_passes",
    }


def test_an_answer_is_kept_and_read_again(tmp_path, monkeypatch):
    asked = []

    def compile_step_of(step_of_way, *, policies, targets, **options):
        asked.append((*policies, *targets, options["compiler_options"]))
        told = row(*policies, *targets, peak=2, accessed=1, buffers=(BUFFER,))
        return StepReport((told,))

    monkeypatch.setattr(compiled_steps, "STORE", tmp_path)
    monkeypatch.setattr(compiled_steps, "compile_step_of", compile_step_of)
    case = ("Transformer-XL base", "float32", "h100")
    assert compiled_steps.row(*case, only_stored=True) is None
    assert not asked
    first = compiled_steps.row(*case)
    assert (first.peak, first.roofline.seconds) == (2 * GIB, 0.01)
    assert first.buffers[0].array == "bf16[8,8]"
    assert compiled_steps.row(*case, only_stored=True) == first
    assert asked == [("float32", "h100", {"xla_gpu_enable_triton_gemm": False})]


def test_a_step_is_compiled_with_its_shapes():
    step, state, batch = compiled_steps.abstract_step("BERT-Base", "bfloat16 autocast")
    new_state, loss = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert loss.shape == ()
