"""What autocast hands to XLA: no cast is undone, and each weight is cast once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmp
from jaxmp.testing import zoo
from jaxmp.testing._functional import path_of
from tests.support.stablehlo import Program
from tests.support.thinning import every_second

NAMES = ("mlp", "cnn", "lstm", "encoder", "decoder", "transformer_xl")
WITHOUT_LOOPS = ("mlp", "cnn", "decoder", "transformer_xl")
residuals = pytest.mark.parametrize("half_residuals", [True, False])
# By kind, or all linen networks would be lowered in one way, and all nnx ones in the
# other.
by_kind = sorted(zoo(), key=lambda model: model.kind)
in_either_way = every_second(
    "model half_residuals", [m for m in by_kind if m.name in NAMES], [True, False]
)
without_loops = pytest.mark.parametrize(
    "model", [m for m in zoo() if m.name in WITHOUT_LOOPS], ids=str
)


def lower(loss, *arguments, half_residuals=True):
    cast = jaxmp.autocast(loss, half_residuals=half_residuals)
    return Program(jax.jit(jax.value_and_grad(cast)).lower(*arguments))


def lower_model(model, half_residuals):
    module = nnx.eval_shape(model.make) if model.kind == "nnx" else model.make()
    apply, params, state = model.functional(module)

    def loss(params):
        return model.loss(apply(params, state, *model.inputs)[0], model.target)

    return lower(loss, params, half_residuals=half_residuals), params


def gpt(params, tokens):
    """Two blocks of a pre-norm transformer, with the table for a head."""

    def norm(x):
        return jax.nn.standardize(x)

    x = params["table"][tokens[:-1]]
    for block in params["blocks"]:
        q, k, v = jnp.split(norm(x) @ block["qkv"], 3, axis=-1)
        scores = jnp.where(jnp.tri(len(x), dtype=bool), q @ k.T / 4.0, -1e9)
        x = x + jax.nn.softmax(scores) @ v @ block["out"]
        x = x + jax.nn.gelu(norm(x) @ block["up"]) @ block["down"]
    shares = jax.nn.log_softmax(norm(x) @ params["table"].T)
    return -jnp.mean(jnp.take_along_axis(shares, tokens[1:, None], axis=1))


def gpt_arguments():
    rng = np.random.default_rng(0)

    def weight(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)

    def block():
        shapes = {"qkv": (16, 48), "out": (16, 16), "up": (16, 32), "down": (32, 16)}
        return {name: weight(*shape) for name, shape in shapes.items()}

    params = {"table": weight(20, 16), "blocks": [block(), block()]}
    return params, jnp.asarray(rng.integers(20, size=9))


def check_round_trips(program, half_residuals):
    found = program.round_trips()
    assert not {trip for trip in found if trip.startswith("bf16 f32 bf16")}
    # The cotangent of a softmax's half result is half: this changes its value, so it is
    # no cast that is undone.
    kept = ("multiply",) if half_residuals else ()
    assert found.keys() <= {f"f32 bf16 f32 after {name}" for name in kept}


@in_either_way
def test_no_cast_is_undone_in_a_network(model, half_residuals):
    program, _ = lower_model(model, half_residuals)
    check_round_trips(program, half_residuals)
    if model.name in ("mlp", "cnn", "lstm"):
        assert not program.round_trips()


@residuals
def test_no_cast_is_undone_in_a_gpt(half_residuals):
    program = lower(gpt, *gpt_arguments(), half_residuals=half_residuals)
    check_round_trips(program, half_residuals)


@in_either_way
def test_no_parameter_is_cast_twice(model, half_residuals):
    program, params = lower_model(model, half_residuals)
    found = program.casts_of_arguments("bf16")
    assert set(found.values()) == {1}
    assert len(found) <= len(jax.tree.leaves(params))


@without_loops
def test_every_kernel_is_cast_once(model):
    program, params = lower_model(model, True)
    found = program.casts_of_arguments("bf16")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = [i for i, (path, _) in enumerate(leaves) if "kernel" in path_of(path)]
    assert kernels
    assert {found[i] for i in kernels} == {1}


def test_a_table_that_is_a_head_too_is_cast_once():
    params, tokens = gpt_arguments()
    found = lower(gpt, params, tokens).casts_of_arguments("bf16")
    assert found == dict.fromkeys(range(len(jax.tree.leaves(params))), 1)


def test_round_trips_and_second_casts_are_seen():
    def fn(w, x):
        y = (x @ w.astype(jnp.bfloat16)).astype(jnp.float32)
        narrow = jax.jit(lambda y: y.astype(jnp.bfloat16))
        wide = narrow(y).astype(jnp.float32) @ w
        return wide + (w.T.astype(jnp.bfloat16) @ narrow(y)).astype(jnp.float32)

    w, x = jnp.ones((4, 4)), jnp.ones((4, 4), jnp.bfloat16)
    program = Program(jax.jit(fn).lower(w, x))
    assert program.round_trips()["bf16 f32 bf16 after dot_general"] == 2
    assert program.casts_of_arguments("bf16") == {0: 2}
