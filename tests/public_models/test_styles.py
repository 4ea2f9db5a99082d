"""The ways in which public code is written, under autocast and apply_policy."""

import functools
import itertools
from typing import Any

import pytest

from . import measures
from .measures import POLICIES, SHARES, Training, matmuls, sums_in_half, types
from .styles import styles

WAYS = ("autocast", "apply_policy")
CASES = [
    (name, way, policy)
    for name, way, policy in itertools.product(styles(), WAYS, POLICIES)
    if way == "autocast" or styles()[name].is_module
]
# These are trained in every run, for they differ most from one another: by autocast in
# bfloat16, by apply_policy in float16.
TRAINED = ("linen-struct_config_scan", "linen-loss_inside", "nnx-stacked_tied")


def _parametrised(cases: Any) -> Any:
    return pytest.mark.parametrize(("name", "way", "policy"), cases)


def _is_traced(name: str, way: str, policy: str) -> bool:
    other = list(styles()).index(name) % 2 and styles()[name].is_module
    return policy == POLICIES[0] and way == WAYS[bool(other)]


every = _parametrised(
    [
        case if _is_traced(*case) else pytest.param(*case, marks=pytest.mark.slow)
        for case in CASES
    ]
)


def _is_trained(name: str, way: str, policy: str) -> bool:
    crossed = (way == "autocast") == (policy == POLICIES[0])
    return name in TRAINED and crossed


trained = _parametrised(
    [
        case if _is_trained(*case) else pytest.param(*case, marks=pytest.mark.slow)
        for case in CASES
    ]
)


@functools.cache
def trace(name: str, way: str, policy: str) -> Any:
    return measures.trace(*styles()[name].prepare(way, policy))


@functools.cache
def training(name: str, way: str | None, policy: str) -> Training:
    loss, variables = styles()[name].prepare(way, policy)
    return measures.train(loss, variables, policy, 5 if way else 1)


@every
def test_matmuls_are_in_half(name, way, policy):
    found = matmuls(trace(name, way, policy))
    assert found.share >= SHARES[way], found.others.most_common(5)


@every
def test_sums_and_the_loss_are_in_float32(name, way, policy):
    jaxpr = trace(name, way, policy)
    assert matmuls(jaxpr).half > 0
    assert sums_in_half(jaxpr) == []
    assert {x.aval.dtype.name for x in jaxpr.outvars} == {"float32"}


@pytest.mark.parametrize("name", [n for n, s in styles().items() if s.is_module])
def test_parameters_under_apply_policy_have_the_same_paths_and_types(name):
    style = styles()[name]
    _, plain = style.prepare(None, "float32")
    _, half = style.prepare("apply_policy", "mixed_bfloat16")
    assert types(half) == types(plain)


@trained
def test_a_training_is_that_of_float32(name, way, policy):
    assert matmuls(trace(name, way, policy)).half > 0
    full = training(name, None, "float32")
    training(name, way, policy).check(full, way, policy)
