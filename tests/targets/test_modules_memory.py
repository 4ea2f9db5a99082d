"""GPT-2 and ResNet-50 on the H100 and v5e: a policy costs what hand work does.

Prints the table of `examples/benchmarks/modules_memory.py`, which it runs.
"""

import pathlib
import runpy
import sys

import pytest

pytestmark = [pytest.mark.targets, pytest.mark.slow]

SCRIPT = (
    pathlib.Path(__file__).parents[2] / "examples" / "benchmarks" / "modules_memory.py"
)


@pytest.fixture(scope="module")
def benchmark():
    sys.path.append(str(SCRIPT.parent))
    return runpy.run_path(str(SCRIPT))


# ResNet-50 takes the TPU's compiler many minutes; the script has its line.
@pytest.mark.parametrize(
    ("name", "target"),
    [("GPT-2 small", "h100"), ("GPT-2 small", "tpu-v5e"), ("ResNet-50", "h100")],
)
def test_a_policy_takes_the_memory_of_dtypes_by_hand(benchmark, name, target):
    job = benchmark["jobs"]()[name]
    models = benchmark["models"](job)
    hand = benchmark["measure"](job, models["bfloat16 by hand"], target)
    policy = benchmark["measure"](job, models["apply_policy"], target)
    print(f"{name} on {target}: by hand {hand}, apply_policy {policy} GiB")
    assert policy[0] <= hand[0]
    assert hand[1] is None or policy[1] <= hand[1]
