"""The first and the last of the numbered blocks of a model."""

import pytest

from jaxmp.errors import InvalidRule
from jaxmp.policy import first_and_last_in_half
from jaxmp.policy.blocks import outer_blocks

PATHS = {
    "linen": ([f"block_{i}/mlp/up" for i in range(12)], {"block_0", "block_11"}),
    "Hugging Face": (
        [f"encoder/layer/{i}/output/dense" for i in range(6)],
        {"encoder/layer/0", "encoder/layer/5"},
    ),
    "two stacks": (
        [f"{stack}/layers_{i}/q" for stack in ("enc", "dec") for i in range(3)],
        {"enc/layers_0", "enc/layers_2", "dec/layers_0", "dec/layers_2"},
    ),
    "layers in blocks": (
        [f"Block_{i}/Dense_{k}" for i in range(3) for k in range(2)],
        {"Block_0", "Block_2"},
    ),
    "layers alone": ([f"Dense_{i}" for i in range(4)], {"Dense_0", "Dense_3"}),
    "a single one": (["Block_0/Dense_1", "head"], set()),
    "none": (["", "head", "encoder"], set()),
    "blocks in one block": (
        [f"Model_0/h_{i}/fc" for i in range(3)],
        {"Model_0/h_0", "Model_0/h_2"},
    ),
}


@pytest.mark.parametrize(("paths", "expected"), PATHS.values(), ids=PATHS)
def test_finds_the_outer_blocks(paths, expected):
    assert outer_blocks(paths, 1) == expected
    assert outer_blocks(reversed(paths), 1) == expected


def test_more_of_them():
    paths = [f"block_{i}/mlp" for i in range(12)]
    expected = {f"block_{i}" for i in (0, 1, 10, 11)}
    assert outer_blocks(paths, 2) == expected
    assert len(outer_blocks(paths, 6)) == len(outer_blocks(paths, 9)) == 12


@pytest.mark.parametrize("blocks", [0, -1, 1.5, "2"])
def test_a_number_of_blocks(blocks):
    with pytest.raises(InvalidRule, match="from 1 on"):
        first_and_last_in_half(blocks)
