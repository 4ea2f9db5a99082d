"""What eight H100s and eight v5es send in a step: the goals that jaxmp meets."""

import collectives
import pytest
from models.transformers import TIED
from sharded_cases import GOALS, H100, V5E
from sharded_steps import Case

pytestmark = pytest.mark.targets

LINEN = "FSDP", "linen", "apply_policy"
DEFAULT = Case(*LINEN)
WIDE = Case(*LINEN, "float32")
WINDOW = Case(*LINEN, "float32", 4, data_axes=True, gather="window")
TIED_BY_HAND = Case("FSDP", "linen", "by hand", sizes=TIED)
TIED_TABLE = Case(*LINEN, sizes=TIED)
MOST = {
    (case, target): goal.most[target]
    for goal in GOALS
    if not goal.by_hand
    for case in goal.cases
    for target in (H100, V5E)
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Reports of the cases, compiled anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXMP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        cases = [DEFAULT, WIDE, WINDOW, TIED_BY_HAND, TIED_TABLE]
        on_h100s = collectives.measure(cases, [H100])
        return on_h100s | collectives.measure([WIDE, WINDOW], [V5E])


def sent(row, *kinds):
    """Dtypes of what a step sends in some collectives, single numbers aside."""
    return {
        one.dtype
        for one in row.contents.collectives
        if one.kind in kinds and one.bytes > 2**16
    }


@pytest.mark.parametrize(
    ("case", "target"),
    [(DEFAULT, H100), (WIDE, H100), (WINDOW, H100), (WIDE, V5E), (WINDOW, V5E)],
    ids=str,
)
def test_a_step_sends_no_more_than_its_goal(rows, case, target):
    row = rows[case, target]
    assert round(collectives.wire(row), 2) <= MOST[case, target]
    assert sent(row, "all-gather") == {"bfloat16"}


@pytest.mark.parametrize("target", [H100, V5E])
@pytest.mark.parametrize("case", [WIDE, WINDOW], ids=str)
def test_every_sum_is_in_float32_if_it_shall_be(rows, case, target):
    row = rows[case, target]
    sums = ("all-reduce", "reduce-scatter", "collective-permute")
    assert sent(row, *sums) == {"float32"}
    assert not row.findings


def test_a_tied_table_is_gathered_once(rows):
    by_hand, ours = (rows[case, H100] for case in (TIED_BY_HAND, TIED_TABLE))
    assert collectives.wire(ours) <= 1.02 * collectives.wire(by_hand)
    gathered = {one.dtype: one.times for one in ours.contents.collectives[:1]}
    assert sent(ours, "all-gather") == {"bfloat16"}, gathered
