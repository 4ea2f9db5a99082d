"""What a network under a policy hands to XLA: no cast is undone, weights cast once."""

import jax
import pytest
from flax import nnx

import jaxmp
from jaxmp.testing import zoo
from jaxmp.testing._functional import path_of
from tests.support.stablehlo import Program

WITH_LOOPS = ("lstm", "gru", "encoder", "speech")
policies = pytest.mark.parametrize(
    ("policy", "half"),
    [
        ("mixed_bfloat16", "bf16"),
        pytest.param("mixed_float16", "f16", marks=pytest.mark.slow),
    ],
)
every_model = pytest.mark.parametrize(
    "model",
    [
        m if m.kind == "linen" else pytest.param(m, marks=pytest.mark.slow)
        for m in zoo()
    ],
    ids=str,
)


@pytest.fixture(name="lowered", scope="module")
def lowered_fixture():
    programs = {}

    def lower(model, policy):
        if (model, policy) not in programs:
            programs[model, policy] = _lower(model, policy)
        return programs[model, policy]

    return lower


def _lower(model, policy):
    rules = model.rules(jaxmp.get_policy(policy))
    module = nnx.eval_shape(model.make) if model.kind == "nnx" else model.make()
    module = jaxmp.apply_policy(module, policy, rules=rules)
    apply, params, state = model.functional(module)

    def loss(params):
        return model.loss(apply(params, state, *model.inputs)[0], model.target)

    return Program(jax.jit(jax.value_and_grad(loss)).lower(params)), params


@policies
@every_model
def test_no_cast_is_undone(model, policy, half, lowered):
    program, _ = lowered(model, policy)
    # A norm rounds its result to half; an activation that is written by hand widens it.
    rounds = f"f32 {half} f32 after "
    assert not [
        found for found in program.round_trips() if not found.startswith(rounds)
    ]


@policies
@every_model
def test_every_kernel_is_cast_once(model, policy, half, lowered):
    program, params = lowered(model, policy)
    found = program.casts_of_arguments(half)
    assert set(found.values()) == {1}
    if model.name in WITH_LOOPS:
        return
    for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        if path_of(path).endswith("kernel") and x.dtype == "float32":
            assert found[i] == 1, path_of(path)
