"""`jaxmp/<region>/<dtype>` shows in compiled programs, and changes nothing in them."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import jaxmp
from jaxmp.casting import OpRule
from jaxmp.report import audit

W = jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)
X = jnp.linspace(-2.0, 2.0, 32).reshape(4, 8)


def attention(w, x):
    with jax.named_scope("attention"):
        hidden = jax.nn.relu(x @ w)
        return jax.nn.softmax(hidden @ hidden.T) @ hidden


def norm(w, x):
    y = x @ w
    return (y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)) @ w


def scan(w, x):
    return jax.lax.scan(lambda x, _: (attention(w, x), None), x, length=2)[0]


def remat(w, x):
    return jax.checkpoint(norm)(w, x)


def cond(w, x):
    return jax.lax.cond(x[0, 0] < 0, attention, norm, w, x)


@jax.custom_vjp
def ruled(w, x):
    return x @ w


ruled.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0]))


def custom_vjp(w, x):
    return ruled(w, x)


MATMUL, SOFTMAX, ISLAND = "matmul/bfloat16", "softmax/float32", "island/float32"
# The programs, and the regions that are in them.
PROGRAMS = {
    "attention": (attention, {MATMUL, SOFTMAX, "follow/bfloat16"}),
    "norm": (norm, {MATMUL, ISLAND}),
    "scan": (scan, {MATMUL, SOFTMAX}),
    "remat": (remat, {MATMUL, ISLAND}),
    "cond": (cond, {MATMUL, SOFTMAX, ISLAND}),
    "custom_vjp": (custom_vjp, {MATMUL}),
}


def loss_of(fn, **options):
    return jaxmp.autocast(lambda w, x: jnp.sum(fn(w, x)), **options)


# Most of the time is LLVM's.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def compiled(fn, **options):
    step = jax.jit(jax.value_and_grad(loss_of(fn, **options)))
    return step.lower(W, X).compile(FAST).as_text()


def names_in(text):
    return set(re.findall(r'op_name="([^"]*)"', text))


def regions_in(names):
    return {region for name in names for region in re.findall(r"jaxmp/(\w+/\w+)", name)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_regions_show_in_the_compiled_program(program):
    fn, regions = PROGRAMS[program]
    names = names_in(compiled(fn))
    assert regions <= regions_in(names)
    backward = {name for name in names if "transpose" in name}
    assert MATMUL in regions_in(backward)
    assert MATMUL in regions_in(names - backward)


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_names_the_compiled_program_is_the_same(program):
    fn, _ = PROGRAMS[program]
    named, bare = compiled(fn), compiled(fn, named_scopes=False)
    assert not regions_in(names_in(bare))
    assert without_metadata(named) == without_metadata(bare)


def without_metadata(text):
    """The instructions, without names and source lines, and the tables of those."""
    text = text.partition("\nFileNames")[0] + text[text.find("\n\n%") :]
    return re.sub(r", metadata=\{[^}]*\}", "", text)


def test_a_matmul_is_named_below_its_module():
    names = names_in(compiled(attention))
    dots = {name for name in names if name.endswith("dot_general")}
    assert any("/attention/jaxmp/matmul/bfloat16/dot_general" in name for name in dots)
    assert all("jaxmp/matmul/bfloat16" in name for name in dots)
    softmax = {name for name in names if name.endswith("/exp")}
    assert all("/attention/jaxmp/softmax/float32/exp" in name for name in softmax)


def test_the_regions_of_float16_and_of_rules_have_their_dtypes():
    rules = (OpRule(path="attention", compute="float32"),)
    assert "matmul/float16" in regions_in(names_in(compiled(norm, policy="float16")))
    found = regions_in(names_in(compiled(attention, rules=rules)))
    assert found == {"full/float32"}


def test_names_do_not_enter_the_paths_of_rules_explain_and_audit():
    inner = jaxmp.autocast(attention)

    def outer(w, x):
        with jax.named_scope("block"):
            return attention(w, inner(w, x))

    found = audit(outer, W, X)
    assert {m.path.partition("/attention")[0] for m in found.matmuls} == {"block"}
    assert not any("jaxmp" in m.path for m in found.matmuls)
    told = jaxmp.explain(outer)(W, X)
    assert not any("jaxmp" in row.path for row in told.rows)
    rules = (OpRule(path="block/attention", compute="float32"),)
    jaxmp.autocast(outer, rules=rules)(W, X)


def test_eager_calls_are_the_same_with_and_without_names():
    for fn, _ in PROGRAMS.values():
        named, bare = (loss_of(fn, named_scopes=n)(W, X) for n in (True, False))
        assert named == bare
