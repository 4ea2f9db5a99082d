"""GPT-2 small in plain float32 Flax under autocast, on the H100 and v5e.

Prints the lines of `examples/benchmarks/autocast_gpt2.py`, which it runs.
"""

import pathlib
import runpy

import pytest

pytestmark = [pytest.mark.targets, pytest.mark.slow]

SCRIPT = (
    pathlib.Path(__file__).parents[2] / "examples" / "benchmarks" / "autocast_gpt2.py"
)

MODES = ("float32", "by-hand", "autocast")


@pytest.fixture(scope="module")
def measure():
    return runpy.run_path(str(SCRIPT))["measure"]


def test_the_h100_needs_half_of_the_memory_of_float32(measure):
    full, by_hand, cast = (measure(mode, "h100") for mode in MODES)
    print(f"GiB on the H100: float32 {full}, by hand {by_hand}, autocast {cast}")
    assert cast.temp <= by_hand.temp
    assert cast.arguments + cast.temp <= 0.49 * (full.arguments + full.temp)


def test_the_v5e_needs_no_more_memory_than_by_hand(measure):
    by_hand, cast = (measure(mode, "tpu-v5e") for mode in MODES[1:])
    print(f"GiB on the v5e: by hand {by_hand}, autocast {cast}")
    assert cast.temp <= by_hand.temp
    assert cast.accessed <= 63.9
