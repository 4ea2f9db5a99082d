"""`reduce=float32`: the gradients of weights leave their matmuls in float32.

All else stays: every other matmul, the value, and every program without it.
"""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.testing import equations, matmuls, zoo
from tests.support.distance import distance, norm
from tests.support.gradient_sources import gradient_sources
from tests.support.programs.weights import ONE, PROGRAMS, TWO, W, X, layer
from tests.support.thinning import every_second

FLOAT32 = jnp.dtype("float32")
HALF, WIDE = "mixed_bfloat16", "mixed_bfloat16,reduce=float32"
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
every_program = pytest.mark.parametrize("name", PROGRAMS)
# Where autocast stands: inside the gradient, or around it.
both_ways = pytest.mark.parametrize("way", ["inside", "around"])


def gradient(loss, policy, way="inside"):
    """The value and gradients of a loss under a policy; as it is for None."""
    if policy is None:
        return jax.value_and_grad(loss)
    if way == "inside":
        return jax.value_and_grad(jaxmp.autocast(loss, policy))
    return jaxmp.autocast(jax.value_and_grad(loss), policy)


def only_grads(run):
    return lambda *args: run(*args)[1]


@functools.cache
def traced(name, policy, way):
    """The matmuls that gradients come from, and all matmuls, of a program."""
    loss, args = PROGRAMS[name]
    run = gradient(loss, policy, way)
    sources = gradient_sources(only_grads(run), *args)
    return sources, matmuls(jax.make_jaxpr(run)(*args))


@functools.cache
def traced_zoo(model, policy, way):
    apply, params, state = model.functional(model.make())

    def loss(params):
        output, _ = apply(params, state, *model.inputs)
        return model.loss(output, model.target)

    run = gradient(loss, policy, way)
    return (
        gradient_sources(only_grads(run), params),
        matmuls(jax.make_jaxpr(run)(params)),
    )


def check(half, wide):
    """All gradients come in float32, and no other matmul is another than before."""
    (sources, before), (wide_sources, after) = half, wide
    found = {id(eqn): eqn for eqns in wide_sources.values() for eqn in eqns}
    assert found
    assert {eqn.outvars[0].aval.dtype for eqn in found.values()} == {FLOAT32}
    counts = {path: len(eqns) for path, eqns in sources.items()}
    assert counts == {path: len(eqns) for path, eqns in wide_sources.items()}

    def operands(found):
        return collections.Counter(m.operands for m in found)

    assert operands(after) == operands(before)
    narrow = [m for m in before if m.output != FLOAT32]
    still = [m for m in after if m.output != FLOAT32]
    return len(narrow) - len(still), len(found)


@both_ways
@every_program
def test_gradients_of_weights_leave_their_matmuls_in_float32(name, way):
    fewer, found = check(traced(name, HALF, way), traced(name, WIDE, way))
    # A custom_vjp makes the gradient of its input, too, which nobody reads.
    assert fewer == found + (name == "custom_vjp")


def cases():
    """Every network and way; a default run takes linen, and of that the small ones."""
    few = ("mlp", "cnn", "lstm", "encoder", "recommender")
    large = ("resnet", "transformer_xl")
    for model, way in itertools.product(zoo(), ("inside", "around")):
        is_quick = model.name not in large if way == "inside" else model.name in few
        usual = model.kind == "linen" and is_quick
        marks = [] if usual else [pytest.mark.slow]
        yield pytest.param(model, way, marks=marks, id=f"{model}-{way}")


@pytest.mark.parametrize(("model", "way"), list(cases()))
def test_so_do_those_of_every_network_of_the_zoo(model, way):
    fewer, found = check(traced_zoo(model, HALF, way), traced_zoo(model, WIDE, way))
    assert fewer == found


RUN = (
    "two layers",
    "scan of remat",
    "vmap of weights",
    "cond",
    "custom_vjp",
    "dilated convolution",
    "attention",
    "experts",
    "ragged_dot",
    "transposed",
    "tied table",
    "one-hot table",
    "cast by hand",
    "shard_map",
)


@both_ways
@pytest.mark.parametrize("name", RUN)
def test_a_reduce_dtype_in_half_changes_no_program(name, way):
    loss, args = PROGRAMS[name]

    def text(policy):
        jaxpr = jax.make_jaxpr(gradient(loss, policy, way))(*args)
        return re.sub("0x[0-9a-f]+", "a function", str(jaxpr))

    assert text(f"{HALF},reduce=bfloat16") == text(HALF)


@functools.cache
def results(name, policy, way="inside"):
    loss, args = PROGRAMS[name]
    run = jax.jit(gradient(loss, policy, way), compiler_options=FAST_COMPILE)
    return run(*args)


@every_second("name way", RUN, ["inside", "around"])
def test_the_value_keeps_its_bits_and_the_gradients_are_as_close(name, way):
    _, exact = results(name, None)
    value, half = results(name, HALF, way)
    wide_value, wide = results(name, WIDE, way)
    assert np.asarray(wide_value).tobytes() == np.asarray(value).tobytes()
    assert {g.dtype for g in jax.tree.leaves(wide)} == {FLOAT32}

    def error(grads):
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True)
        return sum(distance(x, y) for x, y in pairs)

    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert error(wide) < error(half) * 1.1 + 0.1 * eps * norm(exact)
    assert error(wide) < 8 * eps * norm(exact)


def test_float16_under_a_loss_scale():
    loss, args = PROGRAMS["two layers"]
    scale = jaxmp.StaticLossScale(2.0**10)
    run = jaxmp.value_and_grad(jaxmp.autocast(loss, "mixed_float16,reduce=float32"))

    def grads(*args):
        return run(*args, loss_scale=scale)[1]

    # The scale is divided out behind the matmul.
    dtypes = {(*m.operands, m.output) for m in matmuls(jax.make_jaxpr(grads)(*args))}
    half = jnp.dtype("float16")
    assert dtypes == {(half, half, half), (half, half, FLOAT32)}
    exact = jax.grad(loss)(*args)
    for x, y in zip(jax.tree.leaves(grads(*args)), jax.tree.leaves(exact), strict=True):
        assert distance(x, y) < 2e-3 * norm(y)


def test_weights_stored_in_half_get_half_gradients_from_float32_matmuls():
    loss, (params, x) = PROGRAMS["two layers"]
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    run = jax.grad(jaxmp.autocast(loss, "bf16-true,reduce=float32"))
    assert {g.dtype.name for g in jax.tree.leaves(run(params, x))} == {"bfloat16"}
    found = [e for es in gradient_sources(run, params, x).values() for e in es]
    assert {eqn.outvars[0].aval.dtype for eqn in found} == {FLOAT32}


# Biases, and whatever else an operation repeats


def biased(p, x):
    return jnp.sum(jnp.tanh((layer(x, p["w"]) + p["bias"]) @ p["w"]) * p["scale"])


BIASED = {"w": W, "bias": jnp.ones((1, 8)), "scale": jnp.ones((1, 8))}


def in_half(p, x):
    """As layers of Flax are: the operands are cast, and everything is in half."""
    p, x = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (p, x))
    return jnp.sum(((x @ p["w"] + p["bias"]) * p["scale"]).astype(jnp.float32))


@pytest.mark.parametrize("loss", [biased, in_half])
def test_gradients_of_biases_and_scales_are_added_up_in_float32(loss):
    def sums(policy):
        run = gradient(loss, policy)
        return [
            eqn.invars[0].aval.dtype.name
            for _, eqn in equations(jax.make_jaxpr(run)(BIASED, X))
            if eqn.primitive.name == "reduce_sum" and eqn.outvars[0].aval.size == 8
        ]

    assert len(sums(WIDE)) >= 2
    assert set(sums(WIDE)) == {"float32"}
    value, grads = gradient(loss, WIDE)(BIASED, X)
    assert float(value) == float(gradient(loss, HALF)(BIASED, X)[0])
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, BIASED)


def test_a_bias_of_many_rows_gets_what_float32_gives():
    """In bfloat16 a sum of 3,000 ones stops growing at 256, if it is made in order."""
    x = jnp.ones((3000, 8))
    grads = jax.grad(jaxmp.autocast(in_half, WIDE))(BIASED, x)
    np.testing.assert_allclose(grads["bias"], 3000.0, rtol=1e-6)


# Other derivatives


def test_forward_mode_is_that_of_reduce_none():
    loss, (params, x) = PROGRAMS["scan"]
    tangents = jax.tree.map(jnp.cos, params)
    found = []
    for policy in (HALF, WIDE):
        cast = functools.partial(jaxmp.autocast(loss, policy), x=x)
        cast = functools.partial(lambda f, p: f(p), cast)
        _, tangent = jax.jvp(cast, (params,), (tangents,))
        _, linear = jax.linearize(cast, params)
        found += [float(tangent), float(linear(tangents))]
    np.testing.assert_allclose(found, found[0], rtol=1e-2)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_multiply_in_half(outer):
    loss, args = PROGRAMS["two layers"]

    def second(policy):
        return outer(jax.grad(jaxmp.autocast(loss, policy)))

    found = matmuls(jax.make_jaxpr(second(WIDE))(*args))
    assert {dtype.name for m in found for dtype in m.operands} == {"bfloat16"}
    exact = jax.tree.leaves(outer(jax.grad(loss))(*args))
    for x, y in zip(jax.tree.leaves(second(WIDE)(*args)), exact, strict=True):
        assert distance(x, y) < 0.05 * norm(exact)


@pytest.mark.parametrize(
    "policy", ["dots_saveable", "dots_with_no_batch_dims_saveable", None]
)
def test_policies_of_checkpoint_know_the_matmuls(policy):
    saved = policy and getattr(jax.checkpoint_policies, policy)

    @functools.partial(jax.checkpoint, policy=saved)
    def network(p, x):
        return layer(layer(x, p["w"]), p["v"])

    def count(policy):
        run = gradient(lambda p, x: network(p, x).sum(), policy)
        return len(matmuls(jax.make_jaxpr(run)(TWO, X)))

    assert count(WIDE) == count(HALF)


# Lookups


def lookup(p, ids):
    return jnp.sum(layer(p["table"][ids], p["w"]) ** 2)


TABLE = {"table": jax.random.normal(jax.random.key(7), (16, 8)), "w": W}
REPEATED = jnp.zeros((3, 500), jnp.int32)


def test_rows_of_a_table_are_added_up_in_float32():
    """In bfloat16 a sum of 1,500 rows stops growing at 256 times one of them."""
    exact = jax.grad(lookup)(TABLE, REPEATED)["table"]
    value, grads = gradient(lookup, WIDE)(TABLE, REPEATED)
    same, _ = gradient(lookup, HALF)(TABLE, REPEATED)
    assert float(value) == float(same)
    assert distance(grads["table"], exact) < 0.02 * norm(exact)


@pytest.mark.parametrize("policy", [HALF, WIDE])
def test_one_device_makes_no_copy_of_a_table(policy):
    run = jax.jit(gradient(lookup, policy), compiler_options=FAST_COMPILE)
    text = run.lower(TABLE, REPEATED).compile().as_text()
    assert "f32[16,8]" in text
    assert "bf16[16,8]" not in text


# What is said


def test_explain_says_which_matmuls_hand_over_float32():
    loss, args = PROGRAMS["two layers"]
    for policy, count in ((HALF, 0), (WIDE, 2)):
        shown = str(jaxmp.explain(loss, policy)(*args))
        assert shown.count("gradients of weights leave it in float32") == count


def test_what_full_precision_keeps_is_left_alone():
    def loss(p, x):
        return jaxmp.full_precision(layer)(x, p["w"]).sum()

    found = matmuls(jax.make_jaxpr(gradient(loss, WIDE))(ONE, X))
    assert {m.operands for m in found} == {(FLOAT32, FLOAT32)}
