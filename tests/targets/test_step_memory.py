"""GPT-2 small and ResNet-50 on the H100 and v5e: a policy costs what hand work does.

The steps are those of `examples/benchmarks/memory_table.py`; those without a loss scale
are compared with dtypes by hand, which have none in bfloat16 either.
"""

import functools
from typing import NamedTuple

import pytest
from compiled_steps import FLOAT32, abstract_step

from jaxmp.report import compile_for

pytestmark = [pytest.mark.targets, pytest.mark.slow]

BY_HAND = "bfloat16 by hand"
APPLY_POLICY = "bfloat16 apply_policy, unscaled"
AUTOCAST = "bfloat16 autocast, unscaled"


class Cost(NamedTuple):
    """GiB that a step needs at its peak and for temporaries, and that it moves."""

    peak: float
    temp: float
    accessed: float


@functools.cache
def cost(model, way, target):
    compiled = compile_for(target, *abstract_step(model, way), donate_argnums=0)
    memory = compiled.memory_analysis()
    temp = memory.temp_size_in_bytes
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed", 0)
    sizes = memory.argument_size_in_bytes + temp, temp, accessed
    found = Cost(*(size / 2**30 for size in sizes))
    print(f"GiB of {model} on {target}, {way}: {found}")
    return found


def test_autocast_needs_half_of_the_memory_of_float32_on_the_h100():
    ways = (FLOAT32, BY_HAND, AUTOCAST)
    full, by_hand, cast = (cost("GPT-2 small", way, "h100") for way in ways)
    assert cast.temp <= by_hand.temp
    assert cast.peak <= 0.49 * full.peak


def test_autocast_needs_no_more_than_dtypes_by_hand_on_the_v5e():
    by_hand, cast = (cost("GPT-2 small", way, "tpu-v5e") for way in (BY_HAND, AUTOCAST))
    assert cast.temp <= by_hand.temp
    assert cast.accessed <= by_hand.accessed


def test_resnet_needs_the_memory_of_dtypes_by_hand_on_the_h100():
    by_hand = cost("ResNet-50", BY_HAND, "h100")
    assert cost("ResNet-50", "bfloat16 autocast", "h100").peak <= 1.02 * by_hand.peak


# ResNet-50 takes the TPU's compiler many minutes; the page has its line.
@pytest.mark.parametrize(
    ("model", "target"),
    [("GPT-2 small", "h100"), ("GPT-2 small", "tpu-v5e"), ("ResNet-50", "h100")],
)
def test_apply_policy_needs_no_more_than_dtypes_by_hand(model, target):
    by_hand = cost(model, BY_HAND, target)
    policy = cost(model, APPLY_POLICY, target)
    assert policy.temp <= by_hand.temp
    assert policy.accessed <= by_hand.accessed
