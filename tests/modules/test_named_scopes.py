"""Layers under `apply_policy` are named by kind and dtype in compiled programs."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxmp

# Most of the time is LLVM's.
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
X = jnp.linspace(-1.0, 1.0, 2 * 4 * 8).reshape(2, 4, 8)
TOKENS = jnp.arange(8).reshape(2, 4)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens, x):
        x = nn.Embed(10, 8)(tokens) + nn.Conv(8, (3,))(x)
        x = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = nn.RNN(nn.GRUCell(8))(x)
        return nn.Dense(4, name="head")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs))
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, tokens, x):
        x = self.embed(tokens) + self.conv(x)
        return self.head(self.rnn(self.attention(self.norm(x))))


RULES = (*jaxmp.default_rules, *jaxmp.head_in_float32("head"))


@functools.cache
def compiled(kind, policy, named_scopes=True):
    """The gradient of the network under a policy, as compiled text."""
    module = Linen() if kind == "linen" else Nnx(nnx.Rngs(0))
    options = {"rules": RULES, "named_scopes": named_scopes}
    module = jaxmp.apply_policy(module, policy, **options)
    if kind == "linen":
        params = jax.eval_shape(module.init, jax.random.key(0), TOKENS, X)
        apply = module.apply
    else:
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def apply(params, *inputs):
            return nnx.merge(graph, params, rest, copy=True)(*inputs)

    def loss(params):
        return jnp.sum(apply(params, TOKENS, X))

    return jax.jit(jax.grad(loss)).lower(params).compile(FAST_COMPILE).as_text()


def regions_in(text):
    names = re.findall(r'op_name="([^"]*)"', text)
    return {region for name in names for region in re.findall(r"jaxmp/(\w+/\w+)", name)}


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_layers_are_named_by_kind_and_dtype(kind):
    layers = {"embed", "conv", "attention", "recurrent", "dense"}
    expected = {f"{layer}/bfloat16" for layer in layers}
    found = regions_in(compiled(kind, "mixed_bfloat16"))
    expected |= {"norm/float32", "dense/float32"}
    assert found - {"follow/bfloat16", "island/float32"} == expected


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_without_names_the_compiled_program_is_the_same(kind):
    named = compiled(kind, "mixed_bfloat16")
    bare = compiled(kind, "mixed_bfloat16", named_scopes=False)
    assert not regions_in(bare)
    assert without_metadata(named) == without_metadata(bare)


def without_metadata(text):
    """The instructions, without names and source lines, and the tables of those."""
    text = text.partition("\nFileNames")[0] + text[text.find("\n\n%") :]
    return re.sub(r", metadata=\{[^}]*\}", "", text)


def test_linen_names_stand_below_the_module_path():
    text = compiled("linen", "mixed_bfloat16")
    assert re.search(r"/head/jaxmp/dense/float32/jaxmp.layer/dot_general", text)


def test_a_dtype_of_the_author_is_the_one_that_is_named():
    module = jaxmp.apply_policy(nn.Dense(4, dtype=jnp.float16), "mixed_bfloat16")
    params = module.init(jax.random.key(0), X)
    text = jax.jit(module.apply).lower(params, X).compile().as_text()
    assert regions_in(text) == {"dense/float16"}


def test_names_do_not_enter_the_paths_of_explain():
    module = jaxmp.apply_policy(Linen(), "mixed_bfloat16")
    params = module.init(jax.random.key(0), TOKENS, X)
    explanation = jaxmp.explain(module.apply)(params, TOKENS, X)
    assert any(row.path.endswith("head") for row in explanation.rows)
    assert not any("jaxmp" in row.path for row in explanation.rows)


def test_an_nnx_layer_that_is_only_named_returns_what_it_returned():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    for policy in ("float32", "mixed_bfloat16"):
        named, bare = (
            jaxmp.apply_policy(nnx.Sequential(model), policy, named_scopes=n)
            for n in (True, False)
        )
        assert jnp.array_equal(named(X), bare(X))
        assert named(X).dtype == bare(X).dtype
