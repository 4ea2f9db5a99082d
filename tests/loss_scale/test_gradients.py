"""`value_and_grad` and `grad`: what they return is what no scale would return."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmp
from jaxmp.errors import (
    MissingAux,
    MissingLossScale,
    MissingLossScaleArgument,
    MultipleLossScales,
    NonFloatingLoss,
    NonScalarLoss,
)

SCALE = jaxmp.StaticLossScale(2.0**10)


def state_with(scale):
    return jaxmp.loss_scaling(optax.adam(0.1), scale).init(jnp.ones(3))


def train_state_with(scale):
    return jaxmp.TrainState.create(
        apply_fn=None, params=jnp.ones(3), tx=optax.adam(0.1), policy="mixed_float16"
    ).replace(opt_state=state_with(scale))


class Linear(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.array([1.0, -2.0, 3.0]))
        self.calls = nnx.Variable(jnp.int32(0))

    def __call__(self, x):
        self.calls[...] += 1
        return jnp.sum(self.w[...] * x)


def nnx_optimizer_with(scale):
    return nnx.Optimizer(
        Linear(), jaxmp.loss_scaling(optax.adam(0.1), scale), wrt=nnx.Param
    )


HOLDERS = {
    "LossScaleState": state_with,
    "deep in a tuple": lambda scale: {"opt": (optax.EmptyState(), [state_with(scale)])},
    "chained": lambda s: optax.chain(
        jaxmp.loss_scaling(optax.adam(0.1), s), optax.clip(1.0)
    ).init(jnp.ones(3)),
    "TrainState": train_state_with,
    "nnx.Optimizer": nnx_optimizer_with,
    "StaticLossScale": jaxmp.StaticLossScale,
    "DynamicLossScale": jaxmp.DynamicLossScale,
}


def assert_same(actual, expected):
    """Same structure, dtypes and bits; keys and float0 included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        if e.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-3, 2.0**15, 2.0**24])
def test_every_holder_of_a_scale_gives_true_loss_and_gradients(holder, scale):
    def loss_fn(w, x):
        return jnp.sum(jnp.sin(w) * x)

    w, x = jnp.array([0.1, 1.0, -2.0]), jnp.float32(3)
    state = HOLDERS[holder](scale)
    assert float(jaxmp.get_loss_scale(state)) == scale
    actual = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=state)
    assert_same(actual, jax.value_and_grad(loss_fn)(w, x))
    assert_same(jaxmp.grad(loss_fn)(w, x, loss_scale=state), actual[1])


def polynomial(a, b, *, c=1.0):
    return jnp.sum(a["u"] ** 2 * b) * c + a["v"] ** 3


A = {"u": jnp.array([1.0, 2.0]), "v": jnp.float32(0.5)}
B = jnp.array([3.0, -1.0])

CALLS = {
    "plain": ({}, (A, B), {}),
    "argnums int": ({"argnums": 1}, (A, B), {}),
    "argnums tuple": ({"argnums": (0, 1)}, (A, B), {}),
    "argnums tuple of one": ({"argnums": (0,)}, (A, B), {}),
    "argnums negative": ({"argnums": -1}, (A, B), {}),
    "argnums list order": ({"argnums": (1, 0)}, (A, B), {}),
    "kwargs": ({}, (A, B), {"c": 4.0}),
    "None leaf": ({}, ({**A, "n": None}, B), {}),
    "kwarg argument": ({}, (A,), {"b": B}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("has_aux", [False, True])
def test_calls_are_those_of_jax(name, has_aux):
    options, args, kwargs = CALLS[name]

    def loss_fn(*args, **kwargs):
        loss = polynomial(*args, **kwargs)
        return (loss, {"twice": 2 * loss, "name": "aux"}) if has_aux else loss

    expected = jax.value_and_grad(loss_fn, has_aux=has_aux, **options)(*args, **kwargs)
    actual = jaxmp.value_and_grad(loss_fn, has_aux=has_aux, **options)(
        *args, loss_scale=SCALE, **kwargs
    )
    if has_aux:
        assert actual[0][1].pop("name") == expected[0][1].pop("name") == "aux"
    assert_same(actual, expected)
    grads = jaxmp.grad(loss_fn, has_aux=has_aux, **options)(
        *args, loss_scale=SCALE, **kwargs
    )
    assert_same(grads[0] if has_aux else grads, expected[1])


def test_argnums_and_has_aux_may_be_positional():
    def loss_fn(a, b):
        return jnp.sum(a * b), a

    (loss, aux), grads = jaxmp.value_and_grad(loss_fn, 1, True)(B, B, loss_scale=SCALE)
    assert_same((loss, aux, grads), (jnp.sum(B * B), B, B))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_gradients_are_at_least_float32_and_the_loss_keeps_its_dtype(dtype):
    loss_fn = lambda w: jnp.sum(w * w)  # noqa: E731
    w = jnp.array([1.0, 2.0], dtype)
    loss, grads = jaxmp.value_and_grad(loss_fn)(w, loss_scale=SCALE)
    assert loss.dtype == dtype
    assert grads.dtype == jnp.float32
    np.testing.assert_array_equal(grads, [2.0, 4.0])


def test_complex_leaves_and_real_loss():
    loss_fn = lambda z: jnp.sum(jnp.abs(z) ** 2)  # noqa: E731
    z = jnp.array([1 + 2j, -3j], jnp.complex64)
    expected = jax.value_and_grad(loss_fn)(z)
    assert_same(jaxmp.value_and_grad(loss_fn)(z, loss_scale=SCALE), expected)


def test_holomorphic_loss():
    z = jnp.complex64(0.5 + 1j)
    expected = jax.value_and_grad(jnp.sin, holomorphic=True)(z)
    step = jaxmp.value_and_grad(jnp.sin, holomorphic=True)
    assert_same(step(z, loss_scale=SCALE), expected)


@pytest.mark.parametrize("scale", [2.0**10, 10.0])
def test_float64_stays_and_is_unscaled_as_such(scale):
    loss_fn = lambda w: jnp.sum(jnp.sin(w["a"])) + jnp.sum(w["b"])  # noqa: E731
    with jax.enable_x64(True):
        w = {"a": jnp.array([1 / 3, 2.0], jnp.float64), "b": jnp.ones(2, jnp.float32)}
        loss, grads = jaxmp.value_and_grad(loss_fn)(
            w, loss_scale=jaxmp.StaticLossScale(scale)
        )
        assert grads["a"].dtype == loss.dtype == jnp.float64
        assert grads["b"].dtype == jnp.float32
        np.testing.assert_allclose(grads["a"], np.cos([1 / 3, 2.0]), rtol=1e-15)


def mixed_tree():
    return {
        "w": jnp.array([1.0, 2.0], jnp.float16),
        "ids": jnp.array([1, 2], jnp.int32),
        "mask": jnp.array([True, False]),
        "z": jnp.complex64(1 + 1j),
        "fp8": jnp.ones(2, jnp.float8_e4m3fn),
        "key": jax.random.key(0),
        "none": None,
    }


def test_integers_booleans_float0_keys_and_none_pass_unchanged():
    def loss_fn(tree):
        kept = tree["w"][tree["ids"] - 1] * tree["mask"]
        noise = jax.random.normal(tree["key"], (2,), jnp.float16)
        return jnp.sum(kept * noise) + jnp.real(tree["z"]).astype(jnp.float16)

    tree = mixed_tree()
    for scale in (SCALE, state_with(2.0**15)):
        loss, grads = jaxmp.value_and_grad(loss_fn, allow_int=True)(
            tree, loss_scale=scale
        )
        expected = jax.value_and_grad(loss_fn, allow_int=True)(tree)
        assert_same(loss, expected[0])
        assert grads["ids"].dtype == grads["mask"].dtype == jax.dtypes.float0
        assert grads["none"] is None
        assert grads["w"].dtype == jnp.float32
        np.testing.assert_array_equal(grads["w"], np.float32(expected[1]["w"]))
        assert bool(jaxmp.all_finite(grads))
    scaled = jaxmp.StaticLossScale(8).unscale(jaxmp.StaticLossScale(8).scale(tree))
    for name in ("ids", "mask", "key", "fp8", "z"):
        assert scaled[name].dtype == tree[name].dtype
        assert bool(jnp.all(scaled[name] == tree[name]))
    assert scaled["none"] is None
    assert bool(jaxmp.all_finite(tree))


def test_gradients_of_none_and_integers_under_a_float16_scale_are_finite(strict):
    tree = {"w": jnp.float16(0.5), "n": None, "i": jnp.int32(3)}
    step = jaxmp.value_and_grad(lambda t: t["w"] * t["w"], allow_int=True)
    loss, grads = jax.jit(step)(tree, loss_scale=jaxmp.DynamicLossScale(2.0**16))
    assert (float(loss), float(grads["w"]), grads["n"]) == (0.25, 1.0, None)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**24])
def test_a_float16_loss_is_scaled_by_no_more_than_float16_can_hold(scale):
    """2^16 is infinite in float16: the loss is scaled by 2^15 at most."""
    loss_fn = lambda w: jnp.sum(w * w)  # noqa: E731
    w = jnp.array([0.5, 0.25], jnp.float16)
    loss, grads = jaxmp.value_and_grad(loss_fn)(w, loss_scale=state_with(scale))
    assert (float(loss), loss.dtype) == (0.3125, jnp.float16)
    np.testing.assert_array_equal(grads, [1.0, 0.5])


def test_the_loss_is_true_where_the_scaled_one_overflows_float16():
    loss_fn = lambda w: w * jnp.float16(1)  # noqa: E731
    w = jnp.float16(60000)
    loss, grad = jaxmp.value_and_grad(loss_fn)(w, loss_scale=state_with(2.0**15))
    assert (float(loss), float(grad)) == (60000.0, 1.0)


def test_a_loss_so_large_that_the_scaled_one_overflows_float32_is_true():
    loss_fn = lambda w: w * 1e30  # noqa: E731
    step = jaxmp.value_and_grad(loss_fn)
    loss, grad = step(jnp.float32(1e5), loss_scale=state_with(2.0**24))
    assert (float(loss), float(grad)) == (
        float(np.float32(1e35)),
        float(np.float32(1e30)),
    )


def test_scaling_keeps_gradients_that_float16_would_lose():
    """A gradient of 2^-26 is below the smallest float16, which is 2^-24."""

    def loss_fn(w):
        y = (w * jnp.float16(1)).astype(jnp.float32)
        return y * jnp.float32(2.0**-26)

    w = jnp.float16(1)
    assert float(jax.grad(loss_fn)(w)) == 0.0
    grad = jaxmp.grad(loss_fn)(w, loss_scale=state_with(2.0**16))
    assert float(grad) == 2.0**-26


def test_nonfinite_gradients_are_returned_as_they_are():
    loss_fn = lambda w: jnp.sum(jnp.sqrt(w))  # noqa: E731
    loss, grads = jaxmp.value_and_grad(loss_fn)(
        jnp.array([0.0, 4.0]), loss_scale=state_with(2.0**15)
    )
    assert float(loss) == 2.0
    np.testing.assert_array_equal(grads, [np.inf, 0.25])


def test_a_nonfinite_loss_is_returned_as_it_is():
    loss, _ = jaxmp.value_and_grad(jnp.log)(jnp.float32(0), loss_scale=SCALE)
    assert float(loss) == -np.inf


# Transforms


def sin_sum(w, x):
    return jnp.sum(jnp.sin(w * x))


def test_jit_with_the_state_as_an_argument_compiles_once():
    step = jax.jit(jaxmp.value_and_grad(sin_sum))
    for scale in (2.0**16, 2.0**3, 1.0):
        step(B, jnp.float32(2), loss_scale=state_with(scale))
    assert step._cache_size() == 1


def test_the_scale_of_the_call_is_used_not_one_of_before():
    step = jaxmp.grad(lambda w: (w * jnp.float16(4)).astype(jnp.float32))
    w = jnp.float16(1)
    assert not np.isfinite(step(w, loss_scale=state_with(2.0**17)))
    assert float(step(w, loss_scale=state_with(2.0**13))) == 4.0


def test_vmap_over_an_ensemble_with_a_scale_each():
    tx = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16")
    w = jnp.arange(6.0).reshape(3, 2)
    states = jax.vmap(tx.init)(w)
    states = states._replace(loss_scale=jnp.array([1.0, 2.0**8, 2.0**20]))
    step = jaxmp.value_and_grad(lambda w: jnp.sum(jnp.sin(w)))
    losses, grads = jax.vmap(lambda w, s: step(w, loss_scale=s))(w, states)
    expected = jax.vmap(jax.value_and_grad(lambda w: jnp.sum(jnp.sin(w))))(w)
    assert_same((losses, grads), expected)


def test_vmap_over_examples_with_one_scale():
    state = state_with(2.0**12)
    step = jaxmp.grad(sin_sum)
    xs = jnp.arange(4.0)
    grads = jax.vmap(lambda x: step(B, x, loss_scale=state))(xs)
    assert_same(grads, jax.vmap(lambda x: jax.grad(sin_sum)(B, x))(xs))


def test_scan_and_checkpoint_inside_and_outside():
    @jax.checkpoint
    def block(carry, x):
        return jnp.tanh(carry * x), carry

    def loss_fn(w, xs):
        return jnp.sum(jax.lax.scan(block, w, xs)[0])

    xs = jnp.linspace(0.5, 1.5, 5)
    state = state_with(2.0**12)
    expected = jax.value_and_grad(loss_fn)(B, xs)
    assert_same(jaxmp.value_and_grad(loss_fn)(B, xs, loss_scale=state), expected)
    checkpointed = jaxmp.value_and_grad(jax.checkpoint(loss_fn))
    assert_same(jax.jit(checkpointed)(B, xs, loss_scale=state), expected)

    def accumulate(total, x):
        grads = jaxmp.grad(sin_sum)(B, x, loss_scale=state)
        return jax.tree.map(jnp.add, total, grads), None

    total, _ = jax.lax.scan(accumulate, jnp.zeros_like(B), xs)
    expected = sum(jax.grad(sin_sum)(B, x) for x in xs)
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_key_as_an_argument():
    def loss_fn(w, key):
        return jnp.sum(w * jax.random.bernoulli(key, shape=w.shape))

    key = jax.random.key(3)
    expected = jax.value_and_grad(loss_fn)(B, key)
    assert_same(jaxmp.value_and_grad(loss_fn)(B, key, loss_scale=SCALE), expected)


def test_second_derivatives_for_a_gradient_penalty():
    state = state_with(2.0**12)

    def penalty(w, grad_fn):
        return jnp.sum(grad_fn(w) ** 2)

    scaled_grad = functools.partial(
        jaxmp.grad(lambda w: jnp.sum(jnp.sin(w))), loss_scale=state
    )
    plain_grad = jax.grad(lambda w: jnp.sum(jnp.sin(w)))
    actual = jaxmp.value_and_grad(penalty)(B, scaled_grad, loss_scale=state)
    assert_same(actual, jax.value_and_grad(penalty)(B, plain_grad))


def test_the_true_loss_can_be_differentiated_from_outside():
    step = jaxmp.value_and_grad(jnp.sin)
    outer = jax.grad(lambda w: step(w, loss_scale=SCALE)[0])
    assert_same(outer(jnp.float32(1)), jnp.cos(jnp.float32(1)))


def test_what_can_be_called_can_be_differentiated():
    class Loss:
        def __call__(self, w):
            return jnp.sum(w * w)

        def method(self, w):
            return jnp.sum(w * w)

    jitted = jax.jit(lambda w: jnp.sum(w * w))
    partial = functools.partial(lambda power, w: jnp.sum(w**power), 2)
    for fun in (Loss(), Loss().method, jitted, partial):
        assert_same(jaxmp.grad(fun)(B, loss_scale=SCALE), 2 * B)


def test_leaks_nothing_and_mixes_no_dtypes(strict):
    step = jax.jit(jaxmp.value_and_grad(lambda w: (jnp.sum(w * w), w), has_aux=True))
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        w = jnp.array([1.0, 2.0], dtype)
        (loss, _), grads = step(w, loss_scale=jaxmp.DynamicLossScale(2.0**4))
        assert (loss.dtype, grads.dtype) == (dtype, jnp.float32)


# Other libraries' differentiation


@pytest.mark.parametrize("has_aux", [False, True])
def test_nnx_value_and_grad_updates_the_module_once(has_aux):
    optimizer = nnx_optimizer_with("mixed_float16")
    model = Linear()

    def loss_fn(model, x):
        loss = model(x) ** 2
        return (loss, x) if has_aux else loss

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = jaxmp.value_and_grad(
            loss_fn, has_aux=has_aux, transform=nnx.value_and_grad
        )(model, x, loss_scale=optimizer)
        return value, grads

    value, grads = step(model, optimizer, jnp.ones(3))
    loss = value[0] if has_aux else value
    assert float(loss) == 4.0
    np.testing.assert_array_equal(jax.tree.leaves(nnx.state(grads, nnx.Param))[0], 4.0)
    assert int(model.calls[...]) == 1


def test_nnx_diff_state_as_argnums():
    model = Linear()
    only_params = nnx.DiffState(0, nnx.Param)
    loss_fn = lambda model, x: model(x) ** 2  # noqa: E731
    loss, grads = jaxmp.value_and_grad(
        loss_fn, argnums=only_params, transform=nnx.value_and_grad
    )(model, jnp.ones(3), loss_scale=SCALE)
    expected = nnx.value_and_grad(loss_fn, argnums=only_params)(model, jnp.ones(3))
    assert float(loss) == float(expected[0])
    np.testing.assert_array_equal(
        jax.tree.leaves(grads)[0], jax.tree.leaves(expected[1])[0]
    )


def test_nnx_optimizer_skips_and_backs_off():
    model = Linear()
    tx = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = jaxmp.value_and_grad(
            lambda model: model(x), transform=nnx.value_and_grad
        )(model, loss_scale=optimizer)
        optimizer.update(model, grads, value=loss)
        return loss

    step(model, optimizer, jnp.ones(3))
    before = np.asarray(model.w[...])
    step(model, optimizer, jnp.array([1.0, jnp.inf, 1.0]))
    np.testing.assert_array_equal(before, model.w[...])
    metrics = jaxmp.loss_scale_metrics(optimizer)
    assert int(metrics["applied_steps"]) == int(metrics["skipped_steps"]) == 1
    assert float(jaxmp.get_loss_scale(optimizer)) == 2.0**15
    assert int(jaxmp.select_applied(optimizer, 2, 1)) == 1
    with pytest.raises(jaxmp.errors.LossScaleCollapsed, match="loss itself"):
        jaxmp.raise_if_collapsed(optimizer, max_consecutive_skips=1)
    step(model, optimizer, jnp.ones(3))
    assert not np.array_equal(before, model.w[...])


class Tower(eqx.Module):
    weight: jax.Array
    steps: jax.Array
    activation: object = eqx.field(static=False)
    name: str = "tower"

    def __call__(self, x):
        return self.activation(jnp.sum(self.weight * x))


def test_equinox_filter_value_and_grad_and_a_step():
    model = Tower(jnp.array([0.5, -1.0]), jnp.int32(3), jnp.tanh)
    x = jnp.array([1.0, 2.0])
    tx = jaxmp.loss_scaling(optax.adamw(0.1), "mixed_float16")
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    loss_fn = lambda model, x: model(x) ** 2  # noqa: E731
    expected = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn))(model, x)

    @eqx.filter_jit
    def step(model, state, x):
        loss, grads = jaxmp.value_and_grad(
            loss_fn, transform=eqx.filter_value_and_grad
        )(model, x, loss_scale=state)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params, value=loss)
        return eqx.apply_updates(model, updates), state, loss, grads

    new, state, loss, grads = step(model, state, x)
    assert_same((loss, grads.weight), (expected[0], expected[1].weight))
    assert grads.steps is None
    assert grads.activation is None
    assert int(new.steps) == 3
    assert not np.array_equal(new.weight, model.weight)
    skipped, state, *_ = step(new, state, x * jnp.inf)
    np.testing.assert_array_equal(skipped.weight, new.weight)
    assert int(state.skipped_steps) == 1


def test_equinox_with_aux():
    model = Tower(jnp.array([0.5, -1.0]), jnp.int32(3), jnp.tanh)
    step = jaxmp.value_and_grad(
        lambda m: (m(jnp.ones(2)), "aux"),
        has_aux=True,
        transform=eqx.filter_value_and_grad,
    )
    (loss, aux), grads = step(model, loss_scale=SCALE)
    assert (aux, loss.dtype, grads.name) == ("aux", jnp.float32, None)


# Errors


def lossy(result):
    def my_loss(w):
        del w
        return result

    return my_loss


BAD_LOSSES = [
    (jnp.ones((2, 3)), False, NonScalarLoss, r"my_loss .* shape \(2, 3\)", "jnp.mean"),
    (None, False, NonScalarLoss, "my_loss returned a NoneType", "scalar"),
    ((jnp.ones(()), 1), False, NonScalarLoss, "a tuple", "has_aux=True"),
    (jnp.int32(3), False, NonFloatingLoss, "dtype int32", "astype"),
    (True, False, NonFloatingLoss, "dtype bool", "astype"),
    (jnp.ones(()), True, MissingAux, r"shape \(\)", "leave has_aux out"),
    ((1.0, 2, 3), True, MissingAux, "a tuple", "Return a pair"),
    ((jnp.ones(2), "aux"), True, NonScalarLoss, r"shape \(2,\)", "jnp.mean"),
    ((jnp.int8(1), "aux"), True, NonFloatingLoss, "dtype int8", "astype"),
]


@pytest.mark.parametrize(("result", "has_aux", "error", "value", "repair"), BAD_LOSSES)
@pytest.mark.parametrize("differentiate", [jaxmp.value_and_grad, jaxmp.grad])
def test_a_bad_loss_is_described(result, has_aux, error, value, repair, differentiate):
    step = differentiate(lossy(result), has_aux=has_aux)
    for run in (step, jax.jit(step)):
        with pytest.raises(error, match=value) as raised:
            run(jnp.ones(2), loss_scale=SCALE)
        assert repair in str(raised.value)


@pytest.mark.parametrize("differentiate", [jaxmp.value_and_grad, jaxmp.grad])
def test_a_call_without_loss_scale_shows_the_call(differentiate):
    with pytest.raises(MissingLossScaleArgument) as error:
        differentiate(sin_sum)(B, 1.0)
    assert "jaxmp.value_and_grad(sin_sum)(params, batch, loss_scale=opt_state)" in str(
        error.value
    )
    with pytest.raises(TypeError):
        differentiate(functools.partial(sin_sum, x=1.0))(B)


@pytest.mark.parametrize(
    "state", [None, (), optax.adam(0.1).init(jnp.ones(2)), {"step": 3}, 2.0**16]
)
def test_a_state_without_a_scale_is_named(state):
    with pytest.raises(MissingLossScale) as error:
        jaxmp.value_and_grad(sin_sum)(B, 1.0, loss_scale=state)
    assert type(state).__name__ in str(error.value)
    assert "jaxmp.loss_scaling(optimizer, policy)" in str(error.value)


def test_a_state_with_two_scales_is_refused():
    state = {"generator": state_with(2.0), "discriminator": state_with(4.0)}
    with pytest.raises(MultipleLossScales, match="There are 2 loss scales"):
        jaxmp.value_and_grad(sin_sum)(B, 1.0, loss_scale=state)
