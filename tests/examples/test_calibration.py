"""The constants behind the report's milliseconds, and how they are fitted."""

import pathlib

import calibration
import pytest
from models import TINY_JOBS

from jaxmp.report import chips

H100 = chips["h100"].calibration


def steps_of(share, launch):
    """Steps that take exactly what two constants say."""
    counted = [(0.016, 900), (0.008, 1000), (0.008, 1300), (0.041, 1000)]
    models = ["a", "a", "a", "b"]
    return [
        calibration.Timed(model, str(i), peak / share + n * launch, peak, n)
        for i, (model, (peak, n)) in enumerate(zip(models, counted, strict=True))
    ]


def test_a_fit_finds_the_constants_that_made_the_times():
    share, launch = calibration.fit(steps_of(0.7, 4e-6))
    assert (share, launch) == pytest.approx((0.7, 4e-6))


def test_the_table_says_how_far_off_an_estimate_is():
    table = calibration.tables(steps_of(H100.share_of_peaks / 1.1, 1.1 * H100.launch))
    assert table.count("-9.1 %") == 4  # off by
    assert table.count("+0.0 %") + table.count("-0.0 %") >= 4  # fitted without it


def test_the_page_names_the_constants_that_the_report_uses():
    page = pathlib.Path(__file__).parents[2] / "docs" / "report.md"
    words = " ".join(page.read_text().split())
    share, launch = 100 * H100.share_of_peaks, 1e6 * H100.launch
    assert f"reach {share:.0f} % of the peaks" in words
    assert f"each takes {launch:.1f} microseconds besides" in words


@pytest.mark.slow
def test_a_step_is_timed_on_the_device_that_is_there():
    job, way = TINY_JOBS["GPT-2 small"], calibration.BY_HAND
    assert calibration.seconds_per_step(way, job, rounds=2, steps=1) > 0


@pytest.mark.targets
@pytest.mark.parametrize("case", calibration.MEASURED, ids=" ".join)
def test_the_milliseconds_of_the_report_are_those_of_an_h100(case):
    step = calibration.compiled(*case)
    estimate = step.estimate(H100.share_of_peaks, H100.launch)
    assert estimate == pytest.approx(step.measured, rel=0.15)
