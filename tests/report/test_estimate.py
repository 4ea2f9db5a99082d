"""What a step costs: bytes of each operation, and what is made of them on each chip."""

import json
import pathlib

import pytest

from jaxmp.report import StepReport, chips
from jaxmp.report._rows import Row
from jaxmp.report.compile import targets
from jaxmp.report.compile.chips import chip_of
from jaxmp.report.hlo._parse import read_hlo
from jaxmp.report.hlo._roofline import Roofline, roofline
from jaxmp.report.hlo._traffic import moved

FOLDER = pathlib.Path(__file__).parent / "compiled"
H100, V5E = chips["h100"], chips["tpu-v5e"]


def bytes_moved(program, name):
    computation = program.computations[program.entry]
    instruction = computation.by_name[name]
    return sum(one.bytes for one in moved(program, computation, instruction))


@pytest.fixture(scope="module")
def pieces():
    """Operations of GPT-2 small and ResNet-50, as the H100's compiler wrote them."""
    return read_hlo((FOLDER / "traffic_h100.txt").read_text())


TOKENS, WORDS, PIXELS = 8 * 1024, 50257, 64 * 56 * 56 * 256


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Labels, and 8192 of 412 million elements that are read and written.
        ("input_scatter_fusion.2", 4 * TOKENS + 2 * 4 * TOKENS),
        # Of the logits one for each label, through a bitcast; the row twice.
        ("loop_add_subtract_fusion", 4 * TOKENS * (2 + 1 + 1 + 2)),
        # A third of what one matmul made for queries, keys and values.
        ("input_transpose_fusion.48", 4 * 12 * 64 + 2 * 4 * TOKENS * 768),
        # Three arrays read and one written, though a sum and a select read them.
        ("input_reduce_select_fusion.9", 2 * 4 * PIXELS + 4 * (3 * 256 + 256 * 256)),
        # What the library works in is not moved.
        ("custom-call.316", 4 * (TOKENS * WORDS + WORDS * 768 + TOKENS * 768)),
    ],
)
def test_an_operation_moves_what_a_hand_counts(pieces, name, expected):
    assert bytes_moved(pieces, name) == pytest.approx(expected, rel=1e-6)


PREFETCH = """HloModule jit_step

ENTRY %main (table: f32[1024,768]) -> f32[256,768] {
  %table = f32[1024,768]{1,0:T(8,128)} parameter(0)
  %slice-start = ((f32[1024,768]{1,0:T(8,128)}), f32[256,768]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%table), slice={[0:256], [0:768]}
  %slice-done = f32[256,768]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  ROOT %copy = f32[256,768]{1,0:T(8,128)} copy(%slice-done)
}
"""  # noqa: E501


def test_a_part_that_a_tpu_fetches_ahead_is_read_once():
    program = read_hlo(PREFETCH)
    assert bytes_moved(program, "slice-start") == 4 * 256 * 768
    # It lies in the chip's own memory by then.
    assert bytes_moved(program, "copy") == 4 * 256 * 768


UPDATES = """HloModule jit_step

%fused (stack: f32[100,1000], row: f32[1000], i: s32[]) -> (f32[100,1000], f32[1000]) {
  %stack = f32[100,1000]{1,0} parameter(0)
  %row = f32[1000]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %new = f32[1,1000]{1,0} bitcast(%row)
  %update = f32[100,1000]{1,0} dynamic-update-slice(%stack, %new, %i, %zero)
  ROOT %both = (f32[100,1000]{1,0}, f32[1000]{0}) tuple(%update, %row)
}

%copying (stack: f32[100,1000], row: f32[1000], i: s32[]) -> f32[100,1000] {
  %stack = f32[100,1000]{1,0} parameter(0)
  %row = f32[1000]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %new = f32[1,1000]{1,0} bitcast(%row)
  %update = f32[100,1000]{1,0} dynamic-update-slice(%stack, %new, %i, %zero)
  ROOT %sine = f32[100,1000]{1,0} sine(%update)
}

ENTRY %main (stack: f32[100,1000], row: f32[1000], i: s32[]) -> f32[100,1000] {
  %stack = f32[100,1000]{1,0} parameter(0)
  %row = f32[1000]{0} parameter(1)
  %i = s32[] parameter(2)
  %inside = (f32[100,1000]{1,0}, f32[1000]{0}) fusion(%stack, %row, %i), calls=%fused
  %alone = f32[100,1000]{1,0} dynamic-update-slice(%stack, %row, %i, %i)
  ROOT %copied = f32[100,1000]{1,0} fusion(%stack, %row, %i), calls=%copying
}
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The row is read, and written twice: into the stack and by itself.
        ("inside", 3 * 4000 + 4),
        ("alone", 2 * 4000 + 2 * 4),
        # What computes on the whole of it reads and writes the whole of it.
        ("copied", 2 * 400_000 + 4000 + 4),
    ],
)
def test_what_is_updated_in_place_counts_as_what_is_new(name, expected):
    assert bytes_moved(read_hlo(UPDATES), name) == expected


# What is made of it


def test_an_h100_takes_longer_than_its_peaks_by_two_constants(pieces):
    bare = roofline(pieces, H100._replace(calibration=None))
    timed = roofline(pieces, H100)
    share, launch = H100.calibration.share_of_peaks, H100.calibration.launch
    assert timed.operations == 5
    assert timed.seconds == pytest.approx(
        bare.cost / H100.bandwidth / share + 5 * launch
    )
    assert timed.cost == pytest.approx(timed.seconds * share * H100.bandwidth)
    assert (bare.seconds, bare.launch_cost) == (None, 0)


def test_only_one_device_of_a_chip_that_was_timed_has_milliseconds(pieces):
    assert roofline(pieces, V5E).seconds is None
    assert roofline(pieces._replace(partitions=8), H100).seconds is None
    assert roofline(pieces, V5E).cost > 0


def test_tiny_operations_are_bound_by_launches():
    program = read_hlo(UPDATES)
    assert roofline(program, H100).bound == "launches"
    assert roofline(program, V5E).bound == "memory"


@pytest.mark.parametrize("name", [*targets._DEVICE_KINDS])
def test_a_target_and_its_devices_have_the_same_peaks(name):
    assert chip_of(targets.read_target(name).device_kind) == chips[name]


def test_a_device_is_timed_if_it_is_the_one_that_was():
    assert chip_of("NVIDIA H100 80GB HBM3").calibration == H100.calibration
    for kind in ("NVIDIA H200", "NVIDIA H100 PCIe", "TPU v5 lite"):
        assert chip_of(kind).calibration is None


# How it is shown


def row(policy, target, cost, seconds=None):
    estimate = Roofline(cost, cost / 2, 0.0, 0.0, 1e12, 1e9, 100, seconds)
    return Row(policy, target, True, 2**30, peak=2**20, roofline=estimate)


@pytest.fixture(scope="module")
def told():
    return StepReport(
        (
            row("float32", "h100", 3e9, 0.0123),
            row("bfloat16", "h100", 2e9, 0.0082),
            row("float32", "tpu-v5e", 8e9),
            row("bfloat16", "tpu-v5e", 2e9),
            Row("float16", "tpu-v5e", True, 2**30, peak=2**20),
        )
    )


def test_speed_ups_are_over_the_first_policy_of_a_target(told):
    found = [x["roofline"] and x["roofline"]["speed_up"] for x in told.to_rows()]
    assert found == [1.0, 1.5, 1.0, 4.0, None]
    lines = str(told).splitlines()[1:6]
    assert ["1.50x" in line for line in lines] == [False, True, False, False, False]
    assert "4.00x" in lines[3]


def test_no_form_shows_a_time_that_nobody_measured(told, tmp_path):
    lines = str(told).splitlines()[1:6]
    assert ["12.3" in line or "8.2" in line for line in lines] == [True] * 2 + [
        False
    ] * 3
    seconds = [
        x["roofline"] and x["roofline"]["seconds"] for x in json.loads(told.to_json())
    ]
    assert seconds == [0.0123, 0.0082, None, None, None]
    assert "of these peaks and each operation took" in str(told)
    on_tpu = StepReport(told.rows[2:])
    on_tpu.to_html(tmp_path / "page.html")
    for text in (str(on_tpu), (tmp_path / "page.html").read_text()):
        assert "Milliseconds" not in text
        assert "Speed-ups are over the first policy" in text
    assert on_tpu.to_rows()[0]["roofline"]["seconds"] is None
