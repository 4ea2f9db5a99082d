"""What jaxmp takes for granted of Flax beyond its public interface, one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.linen import fp8_ops

from jaxmp._jaxpr.argument_names import named_leaves
from jaxmp._jaxpr.arguments import flatten_arguments
from jaxmp._jaxpr.flax_internals import (
    CALL_WRAPPED_METHOD,
    FP8_VARIABLES,
    LINEN_MODULE,
    LINEN_TRANSFORMS,
    OVERWRITE_WITH_GRADIENT,
    PROMOTE_DTYPE,
    PROMOTIONS,
    is_flax_layer,
    is_lifted,
)
from jaxmp._jaxpr.primitives import CAST
from jaxmp._jaxpr.scopes import name_scopes
from jaxmp._jaxpr.sources import written
from jaxmp._jaxpr.walk import walk

KEY = jax.random.key(0)
X = jnp.ones((2, 4))


# linen


def test_every_method_of_a_linen_module_is_called_by_one_method():
    calls = []

    def call(self, fun, args, kwargs):
        calls.append(fun.__name__)
        return getattr(nn.Module, CALL_WRAPPED_METHOD)(self, fun, args, kwargs)

    class Net(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)

        def __call__(self, x):
            return self.twice(self.dense(x))

        def twice(self, x):
            return 2 * x

    watched = type("Net", (Net,), {CALL_WRAPPED_METHOD: nn.nowrap(call)})
    watched().init(KEY, X)
    assert calls == ["__call__", "setup", "twice"]


LIFTED = {
    "remat": nn.remat(nn.Dense),
    "jit": nn.jit(nn.Dense),
    "vmap": nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}),
    "scan": nn.scan(
        nn.RNNCellBase, variable_broadcast="params", split_rngs={"params": False}
    ),
}


@pytest.mark.parametrize("name", LIFTED)
def test_a_lifted_transformation_makes_a_class_in_its_own_module(name):
    cls = LIFTED[name]
    assert cls.__module__ == LINEN_TRANSFORMS
    assert is_lifted(cls)
    assert not is_flax_layer(cls)


def test_the_methods_of_a_lifted_class_wrap_those_of_the_class():
    assert vars(LIFTED["remat"])["__call__"].__wrapped__ is nn.Dense.__call__


def test_fp8_metadata_is_in_a_collection_of_this_name():
    assert fp8_ops.OVERWRITE_WITH_GRADIENT == OVERWRITE_WITH_GRADIENT


def test_an_fp8_operation_has_these_variables():
    layer = nn.Dense(4, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    metadata = layer.init(jax.random.key(0), X)[OVERWRITE_WITH_GRADIENT]
    assert set(metadata["Fp8DirectDotGeneralOp_0"]) == FP8_VARIABLES


# Layers


@pytest.mark.parametrize(
    "cls",
    [
        *(nn.Dense, nn.Conv, nn.Embed, nn.LayerNorm, nn.OptimizedLSTMCell, nn.Dropout),
        *(nn.MultiHeadDotProductAttention, nn.SpectralNorm, nn.RNN, nn.Sequential),
        *(nnx.Linear, nnx.Conv, nnx.Embed, nnx.LayerNorm, nnx.LSTMCell, nnx.Dropout),
        *(nnx.MultiHeadAttention, nnx.SpectralNorm, nnx.RNN, nnx.LoRALinear),
    ],
    ids=lambda cls: f"{cls.__module__}.{cls.__name__}",
)
def test_the_layers_of_flax_are_known_by_their_module(cls):
    assert is_flax_layer(cls), cls.__module__


@pytest.mark.parametrize("cls", [nn.Module, nnx.Module])
def test_base_classes_stand_in_other_modules_than_layers(cls):
    assert not is_flax_layer(cls), cls.__module__
    assert nn.Module.__module__ == LINEN_MODULE


# nnx

NNX_LAYERS = {
    "linear": lambda rngs: nnx.Linear(4, 4, rngs=rngs),
    "conv": lambda rngs: nnx.Conv(4, 4, (1,), rngs=rngs),
    "norm": lambda rngs: nnx.LayerNorm(4, rngs=rngs),
}


@pytest.mark.parametrize("name", NNX_LAYERS)
def test_an_nnx_layer_promotes_by_a_function_that_it_holds(name):
    layer = NNX_LAYERS[name](nnx.Rngs(0))
    promote, shown = layer.promote_dtype, []

    def watched(args, *, dtype=None, **kwargs):
        shown.append(dtype)
        return promote(args, dtype=dtype, **kwargs)

    layer.promote_dtype = watched
    layer.dtype = jnp.bfloat16
    layer(X)
    assert set(shown) == {jnp.bfloat16}
    assert promote.__name__ == PROMOTE_DTYPE


def test_an_nnx_layer_holds_its_promotion_under_one_of_these_names():
    attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    for layer in (attention, nnx.Linear(4, 4, rngs=nnx.Rngs(0))):
        held = [name for name in PROMOTIONS if hasattr(layer, name)]
        assert len(held) == 1, sorted(vars(layer))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_flax_promotes_in_a_function_of_this_name(kind):
    if kind == "nnx":
        layer = nnx.Linear(4, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    else:
        layer = nn.Dense(4, dtype=jnp.bfloat16).bind({"params": PARAMS})
    casts = [e for e in walk(jax.make_jaxpr(layer)(X)) if e.primitive.name == CAST]
    found = {
        (how.library, how.caller.partition(".")[0])
        for how in (written(e.source_info.traceback) for e in casts)
    }
    assert found == {("flax", PROMOTE_DTYPE)}


PARAMS = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}


class Model(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(0))])

    def __call__(self, x):
        return self.layers[0](x)


def test_the_path_of_an_nnx_variable_starts_at_its_argument():
    def fn(model, x):
        return model(x)

    leaves, modules = named_leaves(fn, (Model(), X), {})
    names = [leaf.name for leaf in leaves]
    assert names == ["model.layers.0.bias", "model.layers.0.kernel", "x"]
    assert modules == ["model"]


def test_the_class_of_an_nnx_module_can_be_replaced():
    def fn(model, x):
        return model(x)

    arguments, arrays = flatten_arguments(fn, (Model(), X), {})
    jaxpr, _ = arguments.trace(fn, arrays, name_modules=True)
    matmul = next(e for e in walk(jaxpr) if e.primitive.name == "dot_general")
    assert name_scopes(matmul) == ("Model", "layers_0")
