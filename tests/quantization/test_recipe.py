"""Recipes: every name has one, and all say what they multiply in which format."""

import itertools

import pytest

from jaxmp.policy.quantize import RECIPES
from jaxmp.quantization.recipe import (
    ACTIVATION,
    COTANGENT,
    E4M3,
    E5M2,
    INT8,
    WEIGHT,
    recipe_of,
)

MATMULS = {
    "forward": (ACTIVATION, WEIGHT),
    "gradient of the activation": (COTANGENT, WEIGHT),
    "gradient of the weight": (ACTIVATION, COTANGENT),
}
FORMATS = {
    # of each of the three matmuls, left and right; None is in half
    "fp8": [(E4M3, E4M3)] * 3,
    "fp8:hybrid": [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)],
    "fp8:rowwise": [(E4M3, E4M3)] * 3,
    "fp8:rowwise_wgrad_half": [(E4M3, E4M3), (E4M3, E4M3), None],
    "int8": [(INT8, INT8)] * 3,
    "int8:wgrad_half": [(INT8, INT8), (INT8, INT8), None],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_the_format_of_each_operand(name):
    recipe = recipe_of(name)
    assert recipe.name == name
    for roles, formats in zip(MATMULS.values(), FORMATS[name], strict=True):
        swapped = roles[::-1]
        assert recipe.leaves_in_half(roles) is (formats is None)
        assert recipe.leaves_in_half(swapped) is (formats is None)
        if formats is not None:
            assert tuple(map(recipe.format_of, roles)) == formats
            assert tuple(map(recipe.format_of, swapped)) == formats[::-1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_float8_matmul_never_has_two_operands_in_e5m2(name):
    recipe = recipe_of(name)
    for roles in itertools.product((ACTIVATION, WEIGHT, COTANGENT), repeat=2):
        if roles != (COTANGENT, COTANGENT) and recipe.operand != INT8:
            assert E4M3 in map(recipe.format_of, roles)
        assert (recipe.operand != INT8) is name.startswith("fp8")


@pytest.mark.parametrize("name", RECIPES)
def test_only_rows_have_scales_where_the_name_says_so_or_int8_needs_it(name):
    assert recipe_of(name).per_row is ("rowwise" in name or name.startswith("int8"))


def test_recipes_differ_and_are_described_in_words():
    told = {str(recipe_of(name)) for name in RECIPES}
    assert len(told) == len(RECIPES)
    words = str(recipe_of("fp8:hybrid"))
    assert words == "float8_e4m3fn, a scale per array, cotangents float8_e5m2"
    words = str(recipe_of("int8:wgrad_half"))
    assert words == "int8, a scale per row, gradients of weights in half"
