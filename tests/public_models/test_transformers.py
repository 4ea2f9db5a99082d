"""Every architecture that transformers has in Flax, under autocast and apply_policy.

The models are used as their users do: called with arrays by name, with a dropout key,
in training. Under autocast the loss is a function like any other. Under apply_policy
the model's `module` is another one.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import transformers
from transformers.models.auto import modeling_flax_auto
from transformers.models.roformer import modeling_flax_roformer

import jaxmp
from tests.support.thinning import every_second

from . import measures
from .architectures import BY_NAME, TASKS, batch_of, build
from .measures import POLICIES, SHARES, Training, matmuls, sums_in_half, types, weights

# What JAX 0.10 no longer has, and these models still use: their own tests would fail.
# With the old spelling put back, they are like all others.
STALE = {
    "longt5": r"clip\(\) got an unexpected keyword argument 'a_max'",
    "mt5": r"clip\(\) got an unexpected keyword argument 'a_max'",
    "t5": r"clip\(\) got an unexpected keyword argument 'a_max'",
    "roformer": "has no attribute 'split'|has no attribute split",
}
# All are traced in bfloat16, by one of the ways. These are also compiled and trained:
# by autocast in bfloat16, by apply_policy in float16. The rest are slow tests.
TRAINED = ("bert", "gpt2", "t5", "resnet")
WAYS = ("autocast", "apply_policy")
every = pytest.mark.parametrize("name", BY_NAME)


def _slow_unless(wanted: Callable[[str, str, str], bool]) -> pytest.MarkDecorator:
    cases = itertools.product(BY_NAME, WAYS, POLICIES)
    marks = {True: (), False: (pytest.mark.slow,)}
    return pytest.mark.parametrize(
        ("name", "way", "policy"),
        [pytest.param(*case, marks=marks[wanted(*case)]) for case in cases],
    )


def _is_trained(name: str, way: str, policy: str) -> bool:
    crossed = (way == "autocast") == (policy == "mixed_bfloat16")
    return name in TRAINED and crossed


traced = every_second("name way policy", BY_NAME, WAYS, ["mixed_bfloat16"])
trained = _slow_unless(_is_trained)


class _Splitting:
    """An array with the method `split`, which JAX's arrays once had."""

    def __init__(self, array: Any):
        self.shape, self._array = array.shape, array

    def split(self, sections: int, axis: int) -> list[Any]:
        return jnp.split(self._array, sections, axis)


@pytest.fixture(autouse=True)
def old_spellings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what `STALE` lacks."""
    clip, attention = jnp.clip, modeling_flax_roformer.FlaxRoFormerSelfAttention
    rotate = attention.apply_rotary_position_embeddings

    def old_clip(*args: Any, a_max: Any = None, **kwargs: Any) -> Any:
        return clip(*args, **kwargs) if a_max is None else clip(*args, max=a_max)

    def old_rotate(positions: Any, *others: Any) -> Any:
        return rotate(_Splitting(positions), *others)

    monkeypatch.setattr(jnp, "clip", old_clip)
    monkeypatch.setattr(
        attention, "apply_rotary_position_embeddings", staticmethod(old_rotate)
    )


def under_policy(name: str, policy: str) -> Any:
    """A model of transformers whose module is under a policy."""
    model = copy.copy(build(name).model)
    model._module = jaxmp.apply_policy(model.module, policy)
    return model


def loss_of(name: str, way: str | None, policy: str) -> Callable[[Any, Any], Any]:
    """The loss of `(params, state)`; `state` is that of BatchNorm, or empty."""
    model, task = build(name).model, TASKS[BY_NAME[name].task]
    inputs, labels = batch_of(task)
    if way == "apply_policy":
        model = under_policy(name, policy)

    in_training = training_arguments(model)

    def loss(params: Any, state: Any) -> Any:
        variables = {"params": params, **state} if state else params
        output = model(**inputs, **in_training, params=variables)
        # With BatchNorm, its new statistics come second.
        return task.loss(output[0] if state else output, labels)

    return jaxmp.autocast(loss, policy) if way == "autocast" else loss


def training_arguments(model: Any) -> dict[str, Any]:
    """What switches on the dropout of a model, which not all call the same."""
    takes = inspect.signature(type(model).__call__).parameters
    keys = {"dropout_rng": jax.random.PRNGKey(2), "indices_rng": jax.random.PRNGKey(3)}
    modes = {"train": True, "deterministic": False}
    return {n: v for n, v in {**keys, **modes}.items() if n in takes}


@functools.cache
def variables(name: str) -> tuple[Any, Any]:
    """Random parameters, and what BatchNorm keeps besides."""
    found = weights(build(name).shapes)
    if "batch_stats" in found:
        return found["params"], {"batch_stats": found["batch_stats"]}
    return found, {}


@functools.cache
def trace(name: str, way: str, policy: str) -> Any:
    """The program of a loss and its gradient."""
    return measures.trace(loss_of(name, way, policy), variables(name))


@functools.cache
def training(name: str, way: str | None, policy: str) -> Training:
    loss = loss_of(name, way, policy)
    return measures.train(loss, variables(name), policy, 5 if way else 1)


def test_the_table_has_all_that_transformers_has_in_flax():
    mappings = {
        name: mapping
        for name, mapping in vars(modeling_flax_auto).items()
        if name.startswith("FLAX_") and name.endswith("MAPPING_NAMES")
    }
    assert len(mappings) > 10
    known = {name for mapping in mappings.values() for name in mapping}
    assert known == set(BY_NAME)
    written = {
        path.parent.name.replace("_", "-")
        for path in Path(transformers.__file__).parent.glob("models/*/modeling_flax*")
    } - {"auto"}
    # GPT-SW3 is GPT-2 under another name.
    assert written == {n.replace("_", "-") for n in BY_NAME} - {"gpt-sw3"}


@pytest.mark.parametrize("name", STALE)
def test_the_table_of_the_stale_is_right(name, monkeypatch):
    """Without jaxmp they fail too, and for the reason that the table gives."""
    monkeypatch.undo()
    with pytest.raises((TypeError, AttributeError), match=STALE[name]):
        build.__wrapped__(name)


@traced
def test_matmuls_are_in_half(name, way, policy):
    found = matmuls(trace(name, way, policy))
    assert found.share >= SHARES[way], found.others.most_common(5)


@traced
def test_sums_and_the_loss_are_in_float32(name, way, policy):
    jaxpr = trace(name, way, policy)
    assert matmuls(jaxpr).half > 0
    assert sums_in_half(jaxpr) == []
    assert {x.aval.dtype.name for x in jaxpr.outvars} == {"float32"}


@every
def test_parameters_under_apply_policy_have_the_same_paths_and_types(name):
    model = under_policy(name, "mixed_bfloat16")

    def initialise() -> Any:
        return model.init_weights(jax.random.PRNGKey(0), model.input_shape)

    assert types(jax.eval_shape(initialise)) == types(build(name).shapes)


@trained
def test_a_training_is_that_of_float32(name, way, policy):
    assert matmuls(trace(name, way, policy)).half > 0
    full = training(name, None, "float32")
    training(name, way, policy).check(full, way, policy)
