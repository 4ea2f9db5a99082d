"""FP8 metadata is found wherever Flax puts it, and nothing else is taken for it."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from flax.nnx import bridge

from jaxmp._jaxpr.fp8_metadata import overwritten

OWG = "_overwrite_with_gradient"
X = jnp.ones((16, 16))


def variables():
    model = nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    return model.init(jax.random.key(0), X)


def nnx_state(keep=lambda state: state):
    layer = nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    model = bridge.ToNNX(layer, rngs=nnx.Rngs(0))
    model.lazy_init(X)
    types = (nnx.Param, nnx.variable_type_from_name(OWG, allow_register=True))
    return keep(nnx.state(model, types))


def of_another_type():
    """Variables of a type that a user registered under another name."""

    class Scale(nnx.Variable):
        pass

    pure = nnx.as_pure(nnx_state())
    operation = pure["Fp8DirectDotGeneralOp_0"]
    return {
        "operation": {name: Scale(x) for name, x in operation.items()},
        "kernel": nnx.Param(pure["kernel"]),
        "bias": nnx.Param(pure["bias"]),
    }


TREES = {
    "linen": variables,
    "FrozenDict": lambda: freeze(variables()),
    "nested": lambda: [{"model": variables()}, None],
    "nnx": nnx_state,
    "nnx, as nnx.Optimizer shows it": lambda: nnx_state(nnx.as_pure),
    "nnx, of another type": of_another_type,
}


@pytest.mark.parametrize("name", TREES)
def test_the_six_variables_of_a_layer(name):
    tree = TREES[name]()
    found = [
        jax.tree_util.keystr(path)
        for (path, _), is_metadata in zip(
            jax.tree_util.tree_leaves_with_path(tree), overwritten(tree), strict=True
        )
        if is_metadata
    ]
    assert len(found) == 6
    assert len(overwritten(tree)) == 8
    assert all("scale" in path or "amax_history" in path for path in found)


@pytest.mark.parametrize(
    "tree",
    [
        None,
        jnp.ones(2),
        {"input_scale": 1.0, "kernel_scale": 2.0},
        {"norm": {"scale": 1.0, "value": 2.0}},
        {**dict.fromkeys(variables()[OWG]["Fp8DirectDotGeneralOp_0"], 1.0), "w": 1.0},
    ],
    ids=["none", "an array", "some of the names", "a norm", "a name more"],
)
def test_nothing_else(tree):
    assert not any(overwritten(tree))


def test_a_collection_by_name():
    tree = {"params": {"w": 1.0}, "mine": {"a": 2.0, "b": [3.0]}, OWG: 4.0}
    assert overwritten(tree, "mine") == [False, True, True, False]
    assert overwritten(tree) == [True, False, False, False]
