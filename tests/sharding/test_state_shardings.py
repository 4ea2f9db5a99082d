"""Optimizer states of every kind are divided over a mesh axis, and nothing else is."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.errors import PartitionMismatch, UnknownAxis
from jaxmp.numerics import monitor
from jaxmp.optimizers import ema
from jaxmp.sharding import state_shardings

pytestmark = pytest.mark.devices(8)


@functools.cache
def mesh():
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)


def params(dtype=jnp.bfloat16):
    """Weights that divide in the first dimension, in the second, and in none."""
    return {
        "dense": {"kernel": jnp.ones((8, 6), dtype), "bias": jnp.ones(6, dtype)},
        "out": {"kernel": jnp.ones((6, 8), dtype)},
        "scale": jnp.ones((), dtype),
    }


SPECS = {
    "dense": {"kernel": P(None, "model"), "bias": P("model")},
    "out": {"kernel": P("model")},
    "scale": P(),
}
DIVIDED = {
    "dense": {"kernel": P("data", "model"), "bias": P("model")},
    "out": {"kernel": P("model", "data")},
    "scale": P(),
}


def placed(specs=None):
    return jax.tree.map(lambda s: NamedSharding(mesh(), s), specs or SPECS)


def specs_of(shardings):
    return jax.tree.map(lambda s: s.spec, shardings)


def in_float32(tx):
    return tx, jnp.float32


adamw = optax.adamw(0.1)
OPTIMIZERS = {
    "adamw": in_float32(adamw),
    "momentum": in_float32(optax.sgd(0.1, momentum=0.9)),
    "lion": in_float32(optax.lion(0.1)),
    "chain": in_float32(optax.chain(optax.clip_by_global_norm(1.0), adamw)),
    "MultiSteps": in_float32(optax.MultiSteps(adamw, 2).gradient_transformation()),
    "schedule_free": in_float32(optax.contrib.schedule_free_adamw(0.1)),
    "inject_hyperparams": in_float32(
        optax.inject_hyperparams(optax.adamw)(learning_rate=0.1)
    ),
    "loss_scaling": in_float32(jaxmp.loss_scaling(adamw, "mixed_float16")),
    "master_weights": (jaxmp.master_weights(adamw), jnp.bfloat16),
    "split": (jaxmp.master_weights(adamw, split=True), jnp.bfloat16),
    "cast_state": in_float32(jaxmp.cast_state(adamw, "bfloat16")),
    "accumulate": in_float32(jaxmp.accumulate(adamw, 4)),
    "stochastic_rounding": (jaxmp.stochastic_rounding(adamw, seed=0), jnp.bfloat16),
    "ema": in_float32(optax.chain(adamw, ema(0.99))),
    "monitor": in_float32(monitor(jaxmp.loss_scaling(adamw, "mixed_float16"), every=2)),
    "all": (
        jaxmp.loss_scaling(
            jaxmp.master_weights(
                jaxmp.accumulate(jaxmp.cast_state(adamw, "bfloat16"), 2)
            ),
            "mixed_float16",
        ),
        jnp.bfloat16,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_looks_like_the_weights_is_divided_and_the_rest_is_everywhere(name):
    tx, dtype = OPTIMIZERS[name]
    weights = params(dtype)
    state = jax.eval_shape(tx.init, weights)
    found = state_shardings(state, weights, placed())
    assert jax.tree.structure(found) == jax.tree.structure(state)
    whole = jax.tree.structure(weights)
    trees = 0

    def is_like_weights(node):
        return jax.tree.structure(node) == whole

    for part, like in zip(
        jax.tree.leaves(found, is_leaf=is_like_weights),
        jax.tree.leaves(state, is_leaf=is_like_weights),
        strict=True,
    ):
        if is_like_weights(like):
            trees += 1
            assert specs_of(part) == DIVIDED
        else:
            assert part.spec == P()
    assert trees >= 1
    # And JAX can lay it out so.
    laid_out = jax.tree.leaves(jax.jit(tx.init, out_shardings=found)(weights))
    assert [x.sharding for x in laid_out] == jax.tree.leaves(found)


def test_a_factor_of_a_weight_is_everywhere():
    tx = optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9)
    weights = params(jnp.float32)
    found = state_shardings(jax.eval_shape(tx.init, weights), weights, placed())
    factors = [x for x in found[0] if hasattr(x, "v_row")] or [found[0]]
    assert factors[0].v_row["dense"]["kernel"].spec == P()
    momentum = [
        node
        for node in jax.tree.leaves(found, is_leaf=lambda x: hasattr(x, "ema"))
        if hasattr(node, "ema")
    ]
    assert specs_of(momentum[0].ema) == DIVIDED


def test_parts_of_a_model_have_parts_of_the_state():
    labels = {"dense": "a", "out": "b", "scale": "a"}
    tx = jaxmp.loss_scaling(
        optax.multi_transform(
            {"a": adamw, "b": optax.masked(optax.sgd(0.1, momentum=0.9), True)}, labels
        ),
        "mixed_bfloat16",
    )
    weights = params(jnp.float32)
    state = jax.eval_shape(tx.init, weights)
    found = state_shardings(state, weights, placed())
    leaves = dict(jax.tree_util.tree_leaves_with_path(found))
    shapes = dict(jax.tree_util.tree_leaves_with_path(state))
    assert leaves.keys() == shapes.keys()
    specs = {s.spec for path, s in leaves.items() if shapes[path].shape == (8, 6)}
    assert specs == {P("data", "model")}
    specs = {s.spec for path, s in leaves.items() if shapes[path].shape == (6, 8)}
    assert specs == {P("model", "data")}


def test_frozen_weights_have_no_state():
    trainable = {"dense": True, "out": False, "scale": False}
    tx = jaxmp.master_weights(adamw, trainable=trainable)
    state = jax.eval_shape(tx.init, params())
    found = state_shardings(state, params(), placed())
    assert specs_of(found.master["dense"]) == DIVIDED["dense"]
    assert isinstance(found.master["out"]["kernel"], optax.MaskedNode)


def test_a_stack_of_weights_is_divided_as_each_of_them():
    tx = optax.lbfgs(memory_size=3)
    weights = params(jnp.float32)
    state = jax.eval_shape(tx.init, weights)
    memory = state_shardings(state, weights, placed())[0].diff_params_memory
    assert memory["dense"]["kernel"].spec == P(None, "data", "model")
    assert memory["scale"].spec == P()


def test_a_train_state_keeps_the_shardings_of_its_parameters():
    state = jaxmp.TrainState.create(
        apply_fn=None,
        params=params(),
        tx=jaxmp.master_weights(adamw),
        policy="bf16-true",
    )
    found = state_shardings(state, params(), placed())
    assert specs_of(found.params) == SPECS
    assert specs_of(found.opt_state.inner_state.master) == DIVIDED
    assert found.step.spec == P()
    assert isinstance(jax.device_put(state, found), jaxmp.TrainState)


def test_weights_of_one_array_and_in_lists():
    weights = [jnp.ones((8, 2)), (jnp.ones(4), jnp.ones(3))]
    found = state_shardings(
        jax.eval_shape(adamw.init, weights), weights, NamedSharding(mesh(), P())
    )
    assert specs_of(found[0].mu) == [P("data"), (P("data"), P())]
    found = state_shardings(
        jax.eval_shape(adamw.init, weights[0]), weights[0], NamedSharding(mesh(), P())
    )
    assert (found[0].mu.spec, found[0].count.spec) == (P("data"), P())


def test_an_nnx_optimizer():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    tx = jaxmp.loss_scaling(adamw, "mixed_float16")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    weights = nnx.state(model, nnx.Param)
    state = nnx.state(optimizer)
    found = state_shardings(state, weights, NamedSharding(mesh(), P()))
    shapes = jax.tree.leaves(state)
    for x, sharding in zip(shapes, jax.tree.leaves(found), strict=True):
        assert sharding.spec == (P("data") if x.shape == (8, 6) else P())
    assert sum(x.shape == (8, 6) for x in shapes) == 2


def test_annotated_linen_weights():
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    model = nn.Dense(6, kernel_init=init, use_bias=False)
    weights = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8)))
    shardings = nn.get_sharding(weights, mesh())
    state = jax.eval_shape(adamw.init, weights)
    found = state_shardings(state, weights, shardings)
    assert [s.spec for s in jax.tree.leaves(found[0].mu)] == [P("data", "model")]


# Which dimension


@pytest.mark.parametrize(
    ("shape", "spec", "over", "expected"),
    [
        ((8, 8), P(), "data", P("data")),
        ((6, 8), P(), "data", P(None, "data")),
        ((8, 8), P("model"), "data", P("model", "data")),
        ((8, 7), P("model"), "data", P(("model", "data"))),
        ((6, 7), P("model"), "data", P("model")),
        ((8, 8), P("data"), "data", P("data")),
        ((8, 8), P(None, ("data", "model")), "data", P(None, ("data", "model"))),
        ((8, 8), P(), ("data", "model"), P(("data", "model"))),
        ((8, 8), P("model"), ("data", "model"), P("model", "data")),
        ((8,), P(), (), P()),
    ],
)
def test_the_first_free_dimension_that_divides_is_divided(shape, spec, over, expected):
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(optax.sgd(0.1, momentum=0.9).init, weight)
    found = state_shardings(state, weight, NamedSharding(mesh(), spec), over=over)
    assert found[0].trace.spec == expected


# A step


def test_a_divided_step_equals_a_whole_one():
    """ZeRO-1: the weights are everywhere, the state is not."""
    tx = jaxmp.loss_scaling(
        jaxmp.master_weights(optax.chain(optax.clip_by_global_norm(1.0), adamw)),
        "bf16-true",
    )
    everywhere = NamedSharding(mesh(), P())

    def loss_fn(weights, x):
        h = x @ weights["dense"]["kernel"] + weights["dense"]["bias"][None]
        return jnp.mean((h @ weights["out"]["kernel"]).astype(jnp.float32) ** 2)

    def step(weights, state, x):
        loss, grads = jaxmp.value_and_grad(loss_fn)(weights, x, loss_scale=state)
        updates, state = tx.update(grads, state, weights, value=loss)
        return optax.apply_updates(weights, updates), state

    weights = jax.device_put(params(), everywhere)
    shardings = state_shardings(
        jax.eval_shape(tx.init, weights), weights, everywhere, over=("data", "model")
    )
    x = jnp.linspace(-1, 1, 16 * 8, dtype=jnp.bfloat16).reshape(16, 8)
    x = jax.device_put(x, NamedSharding(mesh(), P(("data", "model"))))
    state = jax.jit(tx.init, out_shardings=shardings)(weights)
    divided = jax.jit(step, out_shardings=(everywhere, shardings))
    new, state = divided(weights, state, x)
    # A second step takes what the first has made, and its layout stays.
    _, state = divided(new, state, x)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    kernel = state.inner_state.master["dense"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 6)
    expected, _ = jax.jit(step)(weights, tx.init(weights), x)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.01
        )
    bad = jax.device_put(x.at[3, 3].set(jnp.nan), x.sharding)
    same, state = divided(new, state, bad)
    assert int(state.skipped_steps) == 1
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(same), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Bad input


def shardings_for(weights, shardings, **options):
    return state_shardings(
        jax.eval_shape(adamw.init, weights), weights, shardings, **options
    )


def test_an_axis_that_the_mesh_does_not_have():
    with pytest.raises(UnknownAxis, match=r"over='dta'.*'data', 'model'"):
        shardings_for(params(), placed(), over="dta")


def test_shardings_that_do_not_fit():
    with pytest.raises(PartitionMismatch, match=r"param_shardings is neither.*heads"):
        shardings_for(params(), {"heads": NamedSharding(mesh(), P())})
    with pytest.raises(PartitionMismatch, match=r"'dense/bias' has the shape \(6,\)"):
        shardings_for(params(), NamedSharding(mesh(), P(None, "model")))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(PartitionMismatch, match=r"names no mesh.*NamedSharding\(mesh"):
        shardings_for(params(), one)
