"""The wrappers together with Flax, Orbax, shardings and Optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import NamedSharding, PartitionSpec

import jaxmp
from jaxmp.errors import MasterWeightsMismatch, MissingState
from jaxmp.optimizers import (
    accumulate,
    cast_state,
    check_master_weights,
    ema,
    get_master_weights,
    master_weights,
    stochastic_rounding,
)


def inner():
    schedule = optax.linear_schedule(1e-2, 1e-3, 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


STACKS = {
    "master": lambda: master_weights(inner()),
    "split": lambda: master_weights(inner(), split=True),
    "stochastic": lambda: stochastic_rounding(inner(), seed=3),
    "cast": lambda: master_weights(
        cast_state(inner(), "bfloat16", rounding="stochastic")
    ),
    "nearest": lambda: master_weights(cast_state(inner(), "bfloat16")),
    "accumulate": lambda: master_weights(accumulate(inner(), 2)),
    "ema": lambda: master_weights(optax.chain(inner(), ema(0.99))),
    "everything": lambda: master_weights(
        accumulate(
            optax.chain(
                cast_state(inner(), "bfloat16", rounding="stochastic"), ema(0.99)
            ),
            2,
        ),
        split=True,
    ),
}
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def make(stack):
    return jaxmp.loss_scaling(stack(), "mixed_float16")


def start(dtype=jnp.bfloat16):
    return {"w": jnp.ones((8, 4), dtype), "b": jnp.full((4,), 0.5, dtype)}


def some_grads(i):
    rng = np.random.default_rng(i)
    return {
        "w": jnp.float32(rng.normal(size=(8, 4))),
        "b": jnp.float32(rng.normal(size=4)),
    }


def step_with(tx):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def bits(tree):
    return [
        np.asarray(x).view(f"u{x.dtype.itemsize}") if x.dtype != bool else np.asarray(x)
        for x in jax.tree.leaves(tree)
    ]


def assert_same_bits(x, y):
    for a, b in zip(bits(x), bits(y), strict=True):
        np.testing.assert_array_equal(a, b)


@every_stack
def test_one_compile_strong_types_and_donation(stack):
    tx = make(stack)
    step = step_with(tx)
    params = start()
    state = tx.init(params)
    kinds = [(x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    for i in range(5):
        grads = some_grads(i)
        if i == 3:
            grads["w"] = grads["w"].at[0, 0].set(jnp.inf)
        params, state = step(params, state, grads)
    assert step._cache_size() == 1
    assert kinds == [(x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    assert not any(weak for _, weak in kinds)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params, state)))


@every_stack
def test_a_resumed_run_is_bit_identical(stack, tmp_path):
    import orbax.checkpoint as ocp

    tx = make(stack)
    step = step_with(tx)
    params, state = start(), tx.init(start())
    for i in range(3):
        params, state = step(params, state, some_grads(i))
    saved = {"params": params, "state": state}
    blank = {"params": start(), "state": tx.init(start())}
    packed = serialization.from_bytes(blank, serialization.to_bytes(saved))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", blank)
    assert_same_bits(saved, packed)
    assert_same_bits(saved, restored)
    following = step(restored["params"], restored["state"], some_grads(3))
    assert_same_bits(step(params, state, some_grads(3)), following)


@every_stack
def test_tree_map_params_carries_shardings(stack):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    shardings = {
        "w": NamedSharding(mesh, PartitionSpec("data")),
        "b": NamedSharding(mesh, PartitionSpec()),
    }
    everywhere = NamedSharding(mesh, PartitionSpec())
    tx = make(stack)
    placed = optax.tree_map_params(
        tx,
        jax.device_put,
        tx.init(start()),
        shardings,
        transform_non_params=lambda x: jax.device_put(x, everywhere),
    )
    of_weights = [x for x in jax.tree.leaves(placed) if x.shape == (8, 4)]
    assert of_weights
    assert all(x.sharding == shardings["w"] for x in of_weights)
    params = jax.device_put(start(), shardings)
    sharded, sharded_state = step_with(tx)(params, placed, some_grads(0))
    alone, alone_state = step_with(tx)(start(), tx.init(start()), some_grads(0))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.float32(x), np.float32(y), rtol=1e-2, atol=1e-6
        ),
        (sharded, sharded_state),
        (alone, alone_state),
    )


def test_tree_map_params_passes_over_what_has_no_master():
    params = {"w": jnp.ones(4, jnp.bfloat16), "norm": jnp.ones(4)}
    tx = master_weights(optax.sgd(0.1))
    seen = optax.tree_map_params(
        tx,
        lambda x, name: name if not isinstance(x, optax.MaskedNode) else x,
        tx.init(params),
        {"w": "w", "norm": "norm"},
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert seen.master["w"] == "w"


def test_tree_get_and_tree_set():
    tx = make(STACKS["everything"])
    state = tx.init(start())
    get = optax.tree_utils.tree_get
    assert get(state, "micro_step") == 0
    assert get(state, "mu")["w"].dtype == jnp.bfloat16
    assert get(state, "shadow")["w"].dtype == jnp.float32
    state = optax.tree_utils.tree_set(state, loss_scale=jnp.float32(8))
    assert jaxmp.get_loss_scale(state) == 8


@every_stack
def test_it_works_under_vmap(stack):
    tx = make(stack)
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), start())
    grads = jax.tree.map(lambda x: jnp.stack([x, -x]), some_grads(0))
    state = jax.vmap(tx.init)(params)
    updates, _ = jax.jit(jax.vmap(tx.update))(grads, state, params)
    _, alone = jax.tree.map(lambda x: x[0], (grads, params))
    single, _ = jax.jit(tx.update)(some_grads(0), tx.init(alone), alone)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[0], y, rtol=0.02, atol=1e-2),
        updates,
        single,
    )


class Model(nnx.Module):
    def __init__(self, dtype):
        self.linear = nnx.Linear(4, 4, param_dtype=dtype, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


@every_stack
def test_nnx_optimizer(stack):
    model = Model(jnp.bfloat16)
    optimizer = nnx.Optimizer(model, make(stack), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        def loss_fn(model):
            return jnp.mean((model(x).astype(jnp.float32) - 1) ** 2)

        loss, grads = jaxmp.value_and_grad(loss_fn, transform=nnx.value_and_grad)(
            model, loss_scale=optimizer
        )
        optimizer.update(model, grads)
        return loss

    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.bfloat16)
    losses = [float(step(model, optimizer, x)) for _ in range(60)]
    assert model.linear.kernel.dtype == jnp.bfloat16
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["master", "split", "cast", "accumulate"])
def test_master_weights_of_an_nnx_optimizer(name):
    model = Model(jnp.bfloat16)
    optimizer = nnx.Optimizer(model, make(STACKS[name]), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    state = optimizer.opt_state
    masters = get_master_weights(nnx.as_pure(state), nnx.as_pure(params))
    assert {x.dtype.name for x in jax.tree.leaves(masters)} == {"float32"}
    check_master_weights(nnx.as_pure(state), nnx.as_pure(params))


@every_stack
def test_train_state(stack):
    state = jaxmp.TrainState.create(
        apply_fn=None, params=start(), tx=stack(), policy="mixed_float16"
    )
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for i in range(4):
        state = step(state, some_grads(i))
    assert step._cache_size() == 1
    assert state.params["w"].dtype == jnp.bfloat16
    assert (state.params["w"] != 1).any()
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    assert_same_bits(state.params, restored.params)


def test_a_train_state_of_two_steps_is_an_error_that_names_the_leaf():
    def create():
        return jaxmp.TrainState.create(
            apply_fn=None, params=start(), tx=master_weights(inner()), policy="bfloat16"
        )

    saved = serialization.to_state_dict(create())
    saved["params"] = {**saved["params"], "b": saved["params"]["b"] * 2}
    with pytest.raises(MasterWeightsMismatch, match="4 of 4 weights of 'b'"):
        serialization.from_state_dict(create(), saved)


WRAPPERS = {
    "loss_scaling": lambda tx: jaxmp.loss_scaling(tx, "mixed_float16"),
    "dynamic_loss_scaling": jaxmp.dynamic_loss_scaling,
    "static_loss_scaling": lambda tx: jaxmp.static_loss_scaling(tx, 8),
    "master_weights": jaxmp.master_weights,
    "accumulate": lambda tx: jaxmp.accumulate(tx, 2),
    "stochastic_rounding": lambda tx: jaxmp.stochastic_rounding(tx, seed=0),
    "cast_state": lambda tx: jaxmp.cast_state(tx, "bfloat16"),
    "ema": lambda tx: jaxmp.optimizers.ema(0.9),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("other", ["optax", "none", "dict", "jaxmp"])
def test_the_state_of_another_transformation_is_named(name, other):
    params = {"w": jnp.ones(2)}
    wrong = {
        "optax": optax.adam(0.1).init(params),
        "none": None,
        "dict": {"inner_state": ()},
        "jaxmp": jaxmp.optimizers.ema(0.9).init(params),
    }[other]
    if (name, other) == ("ema", "jaxmp"):
        wrong = jaxmp.master_weights(optax.adam(0.1)).init(params)
    tx = WRAPPERS[name](optax.adam(0.1))
    with pytest.raises(MissingState) as error:
        tx.update(params, wrong, params)
    words = [type(wrong).__name__, "tx.init(params)"]
    words.append("loss_scaling" if "loss" in name else name)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", sorted(set(WRAPPERS) - {"ema"}))
def test_the_repair_that_the_message_names_adopts_the_state(name):
    params = {"w": jnp.ones(2)}
    inner = optax.adam(0.1)
    _, old = inner.update(params, inner.init(params), params)
    tx = WRAPPERS[name](inner)
    state = tx.init(params)._replace(inner_state=old)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    assert int(optax.tree_utils.tree_get(state, "count")) in (2, 3)
