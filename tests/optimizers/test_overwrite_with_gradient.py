"""Flax's float8 layers in a plain Optax loop do what they do in Flax's TrainState."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from flax.linen import fp8_ops
from flax.nnx import bridge
from flax.training import train_state
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxmp
from jaxmp.errors import MissingState, OptimizerOptionError, TransformationOrder
from jaxmp.numerics import monitor
from jaxmp.optimizers import (
    accumulate,
    ema,
    get_ema,
    get_master_weights,
    lint_optimizer,
    master_weights,
    overwrite_with_gradient,
    stochastic_rounding,
)

pytestmark = pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp:DeprecationWarning")

OWG = "_overwrite_with_gradient"
X = jax.random.normal(jax.random.key(1), (16, 16))
NAN = float("nan")


def bits(tree):
    """The leaves of a tree by path, as bytes: NaN is equal to itself, -0.0 not to 0."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}


def dense(op=nn.Fp8DotGeneralOp, **kwargs):
    return nn.Dense(16, dot_general_cls=op, **kwargs)


class Einsum(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (16, 16))
        return nn.Fp8Einsum()("ij,jk->ik", x, w)


class Layers(nn.Module):
    """A stack of layers in one scan, as large models have it."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0, OWG: 0},
            split_rngs={"params": True},
            length=3,
        )
        return scanned()(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(dense(nn.Fp8DirectDotGeneralOp)(x)) + x, None


class Shared(nn.Module):
    """One layer called twice, whose two scales Flax's fm32 combines by maximum."""

    @nn.compact
    def __call__(self, x):
        layer = dense(nn.Fp8DirectDotGeneralOp)
        return layer(4 * layer(x))


MODELS = {
    "Fp8DotGeneralOp": dense(),
    "NANOOFp8DotGeneralOp": dense(nn.NANOOFp8DotGeneralOp),
    "Fp8DirectDotGeneralOp": dense(nn.Fp8DirectDotGeneralOp),
    "Fp8Einsum": Einsum(),
    "bfloat16": dense(nn.Fp8DirectDotGeneralOp, dtype=jnp.bfloat16),
    "scan": Layers(),
    "shared": Shared(),
}


def as_fm32(variables):
    to_fm32 = functools.partial(jax.lax.convert_element_type, new_dtype=fp8_ops.fm32)
    return {**variables, OWG: jax.tree.map(to_fm32, variables[OWG])}


def loss_of(model):
    def loss_fn(variables, x):
        if isinstance(model, Shared):
            variables = as_fm32(variables)
        return jnp.mean(model.apply(variables, x).astype(jnp.float32) ** 2)

    return loss_fn


def start(model):
    return model.init(jax.random.key(0), X)


def step_of(tx, model, gradients=None):
    """One step of the loop that Optax's own guide shows."""
    gradients = gradients or (lambda v, s, x: jax.grad(loss_of(model))(v, x))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, state, x):
        grads = gradients(variables, state, x)
        updates, state = tx.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state

    return step


def scaled_gradients(model):
    differentiate = jaxmp.value_and_grad(loss_of(model))
    return lambda v, s, x: differentiate(v, x, loss_scale=s)[1]


def batches(count):
    return [X * (i + 1) for i in range(count)]


# The same as Flax


@pytest.mark.parametrize("name", MODELS)
def test_five_steps_are_those_of_flax_bit_for_bit(name):
    model = MODELS[name]
    reference = train_state.TrainState.create(
        apply_fn=model.apply, params=start(model), tx=optax.adam(1e-2)
    )

    @jax.jit
    def reference_step(state, x):
        return state.apply_gradients(grads=jax.grad(loss_of(model))(state.params, x))

    tx = overwrite_with_gradient(optax.adam(1e-2))
    step = step_of(tx, model)
    variables, state = start(model), tx.init(start(model))
    for x in batches(5):
        before = bits(variables[OWG])
        reference = reference_step(reference, x)
        variables, state = step(variables, state, x)
        assert bits(variables) == bits(reference.params)
        assert bits(variables[OWG]) != before
    assert step._cache_size() == 1


def test_adam_alone_trains_the_scales():
    """The control: what a plain loop did before."""
    model = dense()
    step = step_of(optax.adam(1e-2), model)
    variables, _ = step(start(model), optax.adam(1e-2).init(start(model)), X)
    wanted = jax.grad(loss_of(model))(start(model), X)
    assert bits(variables[OWG]) != bits(wanted[OWG])


def test_the_inner_state_has_nothing_for_the_scales():
    variables = start(dense())
    of_all = overwrite_with_gradient(optax.adam(1e-2)).init(variables)
    of_trained = optax.adam(1e-2).init(variables["params"])
    shapes = [x.shape for x in jax.tree.leaves(of_trained)]
    assert [x.shape for x in jax.tree.leaves(of_all)] == shapes


@pytest.mark.parametrize("kind", ["FrozenDict", "nested", "without metadata"])
def test_wherever_the_collection_stands(kind):
    variables = {
        "FrozenDict": lambda: freeze(start(dense())),
        "nested": lambda: {"a": start(dense()), "b": [start(Einsum())]},
        "without metadata": lambda: start(dense())["params"],
    }[kind]()
    grads = jax.tree.map(lambda p: p * 3 + 1, variables)
    tx = overwrite_with_gradient(optax.sgd(0.5))
    updates, _ = tx.update(grads, tx.init(variables), variables)
    moved = optax.apply_updates(variables, updates)
    assert jax.tree.structure(moved) == jax.tree.structure(variables)
    trained = optax.apply_updates(variables, jax.tree.map(lambda g: -0.5 * g, grads))
    wanted = {k: bits(grads)[k] if OWG in k else x for k, x in bits(trained).items()}
    assert bits(moved) == wanted


# Exact


FLOATS = {
    "float32": st.floats(width=32, allow_subnormal=True),
    "float16": st.floats(width=16, allow_subnormal=True),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_new_value_is_put_in_place_bit_for_bit(dtype, jit, data):
    arrays = hnp.arrays(dtype, 4, elements=FLOATS[dtype])
    old, new = ({OWG: {"scale": data.draw(arrays)}} for _ in range(2))
    tx = overwrite_with_gradient(optax.sgd(0.1))

    def step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    moved = (jax.jit(step) if jit else step)(old, new)
    assert bits(moved) == bits(new)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float64"])
def test_other_dtypes_are_kept(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = {OWG: jnp.ones(3, dtype)}
        grads = {OWG: jnp.asarray([1e-2, 3, 0], dtype)}
        tx = overwrite_with_gradient(optax.sgd(0.1))
        updates, _ = tx.update(grads, tx.init(params), params)
        moved = optax.apply_updates(params, updates)
        assert moved[OWG].dtype == dtype
        assert bits(moved) == bits(grads)


def test_an_addition_of_numbers_cannot_land():
    """Why the update is no array: there is no float32 u for which 1 + u is this."""
    new = np.float32(1 / 448)
    update = new - np.float32(1)
    near = [np.nextafter(update, np.float32(side)) for side in (-2, 2)]
    assert new not in [np.float32(1) + u for u in (update, *near)]


# Under a loss scale


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_scaled_loop_is_jaxmps_train_state_bit_for_bit(policy):
    model = dense(dtype=jaxmp.get_policy(policy).compute_dtype)
    reference = jaxmp.TrainState.create(
        apply_fn=model.apply, params=start(model), tx=optax.adam(1e-2), policy=policy
    )

    @jax.jit
    def reference_step(state, x):
        loss, grads = state.value_and_grad(loss_of(model))(state.params, x)
        return state.apply_gradients(grads=grads, value=loss)

    tx = jaxmp.loss_scaling(overwrite_with_gradient(optax.adam(1e-2)), policy)
    step = step_of(tx, model, scaled_gradients(model))
    variables, state = start(model), tx.init(start(model))
    for x, finite in zip(
        [X / 9, X / 8, X * NAN, X / 7, X], [1, 1, 0, 1, 1], strict=True
    ):
        before = bits((variables, state.inner_state))
        reference = reference_step(reference, x)
        variables, state = step(variables, state, x)
        assert bits(variables) == bits(reference.params)
        assert bool(state.grads_finite) == finite
        assert (bits((variables, state.inner_state)) != before) == finite
    assert int(state.skipped_steps) == 1
    assert step._cache_size() == 1


def test_scales_under_a_loss_scale_are_not_divided_by_it():
    model = dense()
    variables = start(model)
    scaled = jax.grad(lambda v: 1024 * loss_of(model)(v, X))(variables)
    tx = jaxmp.static_loss_scaling(
        overwrite_with_gradient(optax.sgd(0.1)), 1024, grads_are_scaled=True
    )
    updates, _ = tx.update(scaled, tx.init(variables), variables)
    moved = optax.apply_updates(variables, updates)
    assert bits(moved[OWG]) == bits(scaled[OWG])
    true = jax.grad(loss_of(model))(variables, X)["params"]["bias"]
    np.testing.assert_allclose(moved["params"]["bias"], -0.1 * true, rtol=1e-2)


@pytest.mark.parametrize(
    "wrap",
    [overwrite_with_gradient, lambda tx: overwrite_with_gradient(accumulate(tx, 1))],
    ids=["adam", "accumulate"],
)
def test_an_infinite_history_does_not_stall_training(wrap):
    """Flax's next scale leaves an infinity out, but the history keeps it for long."""
    model = dense()
    variables = start(model)
    history = variables[OWG]["Fp8DotGeneralOp_0"]["input_amax_history"]
    variables[OWG]["Fp8DotGeneralOp_0"]["input_amax_history"] = history.at[5].set(
        jnp.inf
    )
    tx = jaxmp.loss_scaling(wrap(optax.adam(1e-2)), "mixed_float16")
    new, state = step_of(tx, model, scaled_gradients(model))(
        jax.tree.map(jnp.copy, variables), tx.init(variables), X
    )
    assert int(state.applied_steps) == 1
    assert bits(new["params"]) != bits(variables["params"])


def test_without_skipping_every_value_is_put_in_place():
    params = {"w": jnp.ones(2), OWG: jnp.ones(2)}
    grads = {"w": jnp.full(2, jnp.nan), OWG: jnp.full(2, 3.0)}
    tx = jaxmp.loss_scaling(
        overwrite_with_gradient(optax.sgd(0.1)), "float32", skip_nonfinite=False
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    assert optax.apply_updates(params, updates)[OWG].tolist() == [3, 3]


# Accumulation

PARAMS = {"w": jnp.float32(10), OWG: {"scale": jnp.float32(1)}}


def accumulated(tx, micro_batches):
    params, state, seen = PARAMS, tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for grad, scale in micro_batches:
        grads = {"w": jnp.float32(grad), OWG: {"scale": jnp.float32(scale)}}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((float(params["w"]), float(params[OWG]["scale"])))
    return seen


OUTSIDE = {
    "alone": lambda tx: tx,
    "loss_scaling": lambda tx: jaxmp.loss_scaling(tx, "mixed_float16"),
    "master_weights": lambda tx: jaxmp.loss_scaling(
        master_weights(tx), "mixed_float16"
    ),
    "stochastic_rounding": lambda tx: stochastic_rounding(tx, seed=0),
}


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_window_takes_the_largest_scale_of_its_good_micro_batches(outside, bad):
    tx = accumulate(overwrite_with_gradient(optax.sgd(1.0)), 3)
    seen = accumulated(OUTSIDE[outside](tx), [(1, 5), (bad, 9), (3, 4), (1, 2)])
    assert seen == [(10, 1), (10, 1), (8, 5), (8, 5)]


def test_a_window_without_a_good_micro_batch_changes_nothing():
    tx = jaxmp.loss_scaling(
        accumulate(overwrite_with_gradient(optax.sgd(1.0)), 2), "mixed_float16"
    )
    assert accumulated(tx, [(NAN, 5), (NAN, 6), (1, 3), (1, 2)])[1:] == [
        *[(10, 1)] * 2,
        (9, 3),
    ]


@pytest.mark.parametrize("outside", OUTSIDE)
def test_around_accumulate_scales_move_on_every_good_micro_batch(outside):
    tx = overwrite_with_gradient(accumulate(optax.sgd(1.0), 3))
    seen = accumulated(OUTSIDE[outside](tx), [(1, 5), (NAN, 9), (3, 4)])
    assert seen == [(10, 5), (10, 5), (8, 4)]


# Other transformations around and inside

ORDERS = {
    "outermost": lambda tx: overwrite_with_gradient(master_weights(tx)),
    "innermost": lambda tx: master_weights(overwrite_with_gradient(tx)),
    "in a chain": lambda tx: optax.chain(
        optax.identity(), master_weights(overwrite_with_gradient(tx))
    ),
    "before an average": lambda tx: optax.chain(
        overwrite_with_gradient(master_weights(tx)), ema(0.5)
    ),
    "monitored": lambda tx: monitor(
        overwrite_with_gradient(master_weights(tx)), every=1
    ),
    "monitored inside": lambda tx: overwrite_with_gradient(
        monitor(master_weights(tx), every=1)
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_gives_the_same_run(name):
    model = dense(param_dtype=jnp.bfloat16)
    tx = jaxmp.loss_scaling(ORDERS[name](optax.adam(1e-2)), "mixed_bfloat16")
    plain = jaxmp.loss_scaling(master_weights(optax.adam(1e-2)), "mixed_bfloat16")
    step = step_of(tx, model, scaled_gradients(model))
    variables, state = start(model), tx.init(start(model))
    trained, wanted = start(model), plain.init(start(model)["params"])
    for x in batches(4):
        grads = jax.jit(jax.grad(loss_of(model)))(trained, x)
        updates, wanted = plain.update(grads["params"], wanted, trained["params"])
        trained = {
            "params": optax.apply_updates(trained["params"], updates),
            OWG: grads[OWG],
        }
        variables, state = step(variables, state, x)
        assert bits(variables[OWG]) == bits(trained[OWG])
        for p, q in zip(*map(jax.tree.leaves, (variables, trained)), strict=True):
            np.testing.assert_allclose(*map(np.float32, (p, q)), rtol=1e-2, atol=1e-3)
    full = get_master_weights(state, variables)
    assert bits(full[OWG]) == bits(variables[OWG])
    assert full["params"]["kernel"].dtype == jnp.float32


def test_half_scales_have_a_master_or_none():
    params = {"w": jnp.ones(2, jnp.bfloat16), OWG: jnp.ones(2, jnp.bfloat16)}
    grads = jax.tree.map(lambda p: p / 3, params)
    for tx in (
        master_weights(overwrite_with_gradient(optax.sgd(0.1))),
        overwrite_with_gradient(master_weights(optax.sgd(0.1))),
        stochastic_rounding(overwrite_with_gradient(optax.sgd(0.1)), seed=0),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert bits(optax.apply_updates(params, updates)[OWG]) == bits(grads[OWG])


def test_an_average_inside_leaves_the_scales_as_they_are():
    tx = overwrite_with_gradient(optax.chain(optax.sgd(1.0), ema(0.5)))
    grads = {"w": jnp.float32(4), OWG: {"scale": jnp.float32(7)}}
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    averaged = get_ema(state, params)
    assert float(averaged["w"]) == 8
    assert averaged[OWG] is params[OWG] or bits(averaged[OWG]) == bits(params[OWG])


def test_what_decays_inside_does_not_decay_the_scales():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    model = dense()
    tx = overwrite_with_gradient(inner)
    step = step_of(tx, model)
    variables, _ = step(start(model), tx.init(start(model)), X)
    assert bits(variables[OWG]) == bits(
        jax.jit(jax.grad(loss_of(model)))(start(model), X)[OWG]
    )


@pytest.mark.parametrize("around", [optax.scale(0.5), optax.clip(0.1)])
def test_what_changes_updates_raises_outside(around):
    tx = optax.chain(overwrite_with_gradient(optax.sgd(0.1)), around)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(TransformationOrder, match="inside"):
        optax.apply_updates(PARAMS, updates)


def test_apply_if_finite_raises_outside():
    tx = optax.apply_if_finite(overwrite_with_gradient(optax.sgd(0.1)), 2)
    with pytest.raises(TypeError, match="Replacement"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_multi_steps_goes_inside():
    tx = jaxmp.loss_scaling(
        overwrite_with_gradient(optax.MultiSteps(optax.sgd(1.0), 2)), "mixed_float16"
    )
    seen = accumulated(tx, [(1, 5), (NAN, 9), (3, 4)])
    assert seen == [(10, 5), (10, 5), (8, 4)]
    outside = optax.MultiSteps(overwrite_with_gradient(optax.sgd(1.0)), 2)
    with pytest.raises(TransformationOrder, match="Swap"):
        jaxmp.loss_scaling(outside, "mixed_float16").init(PARAMS)


def test_a_loss_scale_goes_around():
    tx = overwrite_with_gradient(jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16"))
    with pytest.raises(TransformationOrder, match="outermost"):
        tx.init(PARAMS)


def test_the_state_of_the_optimizer_alone_is_named():
    tx = overwrite_with_gradient(optax.adam(0.1))
    with pytest.raises(MissingState, match=r"_replace\(inner_state=state\)"):
        tx.update(PARAMS, optax.adam(0.1).init(PARAMS), PARAMS)


def test_the_linter_sees_the_trained_parameters():
    params = {"w": jnp.ones(2, jnp.bfloat16), OWG: jnp.ones(2)}
    of_trained = lint_optimizer(optax.adam(1e-3), {"w": params["w"]})
    found = lint_optimizer(overwrite_with_gradient(optax.adam(1e-3)), params)
    assert [x.kind for x in found] == [x.kind for x in of_trained]
    assert {x.kind for x in found} == {"weights", "moments", "literal"}


# Collections of one's own


def test_another_collection():
    params = {"w": jnp.float32(10), "mine": {"scale": jnp.float32(1)}}
    tx = overwrite_with_gradient(optax.sgd(0.5), "mine")
    updates, _ = tx.update(params, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert (float(moved["w"]), float(moved["mine"]["scale"])) == (5, 1)
    swapped = overwrite_with_gradient(accumulate(optax.sgd(0.5), 2), "mine")
    swapped.update(params, swapped.init(params), params)
    for refusing in (
        accumulate(tx, 2),
        jaxmp.loss_scaling(tx, "mixed_float16"),
        jaxmp.loss_scaling(master_weights(tx), "mixed_float16"),
    ):
        with pytest.raises(TransformationOrder, match="collection"):
            refusing.init(params)


def test_a_collection_that_is_not_there():
    with pytest.raises(OptimizerOptionError, match="'mine'"):
        overwrite_with_gradient(optax.sgd(0.5), "mine").init(PARAMS)


# nnx

METADATA = nnx.variable_type_from_name(OWG, allow_register=True)
WRT = nnx.Any(nnx.Param, METADATA)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.first = bridge.ToNNX(dense(nn.Fp8DirectDotGeneralOp), rngs=rngs)
        self.last = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.last(self.first(x))


def block():
    model = Block(nnx.Rngs(0))
    model.first.lazy_init(X)
    return model


def nnx_loss(model, x):
    return jnp.mean(model(x) ** 2)


def trained_by_hand(x_of_steps):
    """Adam for the parameters, and the new values of the rest put in place."""
    model = block()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    for x in x_of_steps:
        grads = nnx.grad(nnx_loss, argnums=nnx.DiffState(0, WRT))(model, x)
        _, metadata = nnx.split_state(grads, nnx.Param, METADATA)
        optimizer.update(model, grads)
        nnx.update(model, metadata)
    return nnx.state(model, WRT)


def assert_close(found, wanted):
    found, wanted = (
        dict(jax.tree_util.tree_leaves_with_path(nnx.as_pure(x)))
        for x in (found, wanted)
    )
    assert found.keys() == wanted.keys()
    for path, x in found.items():
        np.testing.assert_allclose(x, wanted[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", [None, "float32", "mixed_float16"])
def test_nnx_optimizer(policy):
    model, tx = block(), overwrite_with_gradient(optax.adam(1e-2))
    if policy:
        tx = jaxmp.loss_scaling(tx, policy)
    optimizer = nnx.Optimizer(model, tx, wrt=WRT)
    argnums = nnx.DiffState(0, WRT)
    scaled = jaxmp.value_and_grad(nnx_loss, argnums, transform=nnx.value_and_grad)

    @nnx.jit
    def step(model, optimizer, x):
        if policy:
            _, grads = scaled(model, x, loss_scale=optimizer.opt_state)
        else:
            grads = nnx.grad(nnx_loss, argnums=argnums)(model, x)
        optimizer.update(model, grads)

    for x in batches(4):
        step(model, optimizer, x)
    found = nnx.state(model, WRT)
    wanted = trained_by_hand(batches(4))
    if policy == "mixed_float16":  # what flows back is 2^16 times larger
        operation = found["first"]["Fp8DirectDotGeneralOp_0"]
        assert operation["output_grad_amax_history"][...].max() > 100
        wanted["first"]["Fp8DirectDotGeneralOp_0"] = operation
        for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(x, y, rtol=0.1, atol=0.02)
    else:
        assert_close(found, wanted)


def test_typed_states_of_nnx_in_a_plain_loop():
    model, argnums = block(), nnx.DiffState(0, WRT)
    tx = jaxmp.loss_scaling(overwrite_with_gradient(optax.adam(1e-2)), "float32")
    state = tx.init(nnx.state(model, WRT))
    gradients = jaxmp.value_and_grad(nnx_loss, argnums, transform=nnx.value_and_grad)
    for x in batches(4):
        _, grads = gradients(model, x, loss_scale=state)
        trained = nnx.state(model, WRT)
        updates, state = tx.update(grads, state, trained)
        nnx.update(model, optax.apply_updates(trained, updates))
    assert_close(nnx.state(model, WRT), trained_by_hand(batches(4)))


# Saved and restored


def test_a_resumed_run_is_bit_identical(tmp_path):
    import orbax.checkpoint as ocp

    model = dense()
    tx = jaxmp.loss_scaling(
        master_weights(overwrite_with_gradient(optax.adam(1e-2))), "mixed_float16"
    )
    step = step_of(tx, model, scaled_gradients(model))
    variables, state = start(model), tx.init(start(model))
    for x in batches(3):
        variables, state = step(variables, state, x)
    saved = {"variables": variables, "state": state}
    blank = {"variables": start(model), "state": tx.init(start(model))}
    packed = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(saved))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", blank)
    assert bits(saved) == bits(packed) == bits(restored)
    following = step(restored["variables"], restored["state"], X)
    assert bits(following) == bits(step(variables, state, X))


def test_tree_map_params_finds_the_moments():
    variables = start(dense())
    tx = jaxmp.loss_scaling(overwrite_with_gradient(optax.adam(1e-2)), "mixed_float16")
    marked = optax.tree_map_params(tx, lambda x: x + 1, tx.init(variables))
    moments = marked.inner_state.inner_state[0]
    assert all((x == 1).all() for x in jax.tree.leaves((moments.mu, moments.nu)))
    assert int(moments.count) == 0


# Programs of the kind that Flax's docs show


def test_a_program_that_keeps_its_variables_apart():
    """Flax's guide to FP8: the loop names the collection itself. Now Optax does it."""
    model = dense()
    guide = start(model)
    tx = optax.sgd(0.1)
    guide_state = tx.init(guide["params"])

    @jax.jit
    def guide_step(variables, state, x):
        grads = jax.grad(loss_of(model))(variables, x)
        updates, state = tx.update(grads["params"], state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, OWG: grads[OWG]}, state

    ours = overwrite_with_gradient(optax.sgd(0.1))
    step = step_of(ours, model)
    variables, state = start(model), ours.init(start(model))
    for x in batches(3):
        guide, guide_state = guide_step(guide, guide_state, x)
        variables, state = step(variables, state, x)
    assert bits(guide) == bits(variables)


def test_a_loop_under_scan_and_one_optimizer_for_each_part():
    """Steps as the body of a scan, with `optax.partition` around kernels and biases."""
    model = MODELS["scan"]
    labels = lambda tree: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "bias" if "bias" in jax.tree_util.keystr(path) else "rest", tree
    )
    inner = optax.partition({"bias": optax.sgd(0.1), "rest": optax.adam(1e-2)}, labels)
    tx = jaxmp.loss_scaling(overwrite_with_gradient(inner), "mixed_float16")
    step = step_of(tx, model, scaled_gradients(model))
    together = start(model), tx.init(start(model))
    one_by_one = start(model), tx.init(start(model))

    @jax.jit
    def run(carry, xs):
        return jax.lax.scan(lambda c, x: (step(*c, x), None), carry, xs)[0]

    together = run(together, jnp.stack(batches(3)))
    for x in batches(3):
        one_by_one = step(*one_by_one, x)
    for x, y in zip(*map(jax.tree.leaves, (together, one_by_one)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    assert int(together[1].applied_steps) == 3


def test_an_ensemble_under_vmap_skips_member_by_member():
    model = dense()
    variables = jax.vmap(lambda key: model.init(key, X))(
        jax.random.split(jax.random.key(0), 2)
    )
    tx = jaxmp.loss_scaling(overwrite_with_gradient(optax.adam(1e-2)), "mixed_float16")
    state = jax.vmap(tx.init)(variables)
    step = step_of(tx, model, scaled_gradients(model))
    before = bits(jax.tree.map(lambda x: x[1], variables))
    moved, state = jax.vmap(step)(variables, state, jnp.stack([X, X * NAN]))
    assert bits(jax.tree.map(lambda x: x[1], moved)) == before
    assert state.skipped_steps.tolist() == [0, 1]
    scale = moved[OWG]["Fp8DotGeneralOp_0"]["input_amax_history"]
    assert float(scale[0].max()) == float(jnp.abs(X).max())
