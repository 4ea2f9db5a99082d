"""`transform=`: the known ones work, and the wrong one for a model is named."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmp
from jaxmp.errors import TransformError

SCALE = jaxmp.StaticLossScale(1024)
X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


class Network(nnx.Module):
    def __init__(self, *, norm=False, dropout=False):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(0.5, rngs=rngs) if dropout else None

    def __call__(self, x):
        for layer in (self.dense, self.norm, self.dropout):
            x = x if layer is None else layer(x)
        return x


def loss_fn(model, x=X):
    predicted = model(x) if isinstance(model, nnx.Module) else jax.vmap(model)(x)
    return jnp.mean(predicted**2)


MODELS = {
    "jax": (jax.grad, jax.value_and_grad, lambda: Network()),
    "nnx": (nnx.grad, nnx.value_and_grad, lambda: Network(norm=True, dropout=True)),
    "equinox": (
        eqx.filter_grad,
        eqx.filter_value_and_grad,
        lambda: eqx.nn.Linear(4, 4, key=jax.random.key(0)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial])
@pytest.mark.parametrize("function", [jaxmp.grad, jaxmp.value_and_grad])
@pytest.mark.parametrize("has_aux", [False, True])
def test_a_grad_is_taken_for_its_value_and_grad(name, wrap, function, has_aux):
    grad, value_and_grad, make = MODELS[name]
    fun = (lambda model: (loss_fn(model), {"a": 1.0})) if has_aux else loss_fn
    expected = function(fun, has_aux=has_aux, transform=value_and_grad)
    actual = function(fun, has_aux=has_aux, transform=wrap(grad))
    expected = expected(make(), loss_scale=SCALE)
    actual = actual(make(), loss_scale=SCALE)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, **kwargs: jax.grad(f, **kwargs),
        lambda f, **kwargs: lambda *args: 1.0,
        lambda f, **kwargs: lambda *args: (1.0, 2.0),
    ],
)
def test_a_transform_without_a_value_says_which_to_use(transform):
    with pytest.raises(TransformError, match=r"<lambda> returned .*nnx.value_and_grad"):
        jaxmp.grad(lambda w: w**2, transform=transform)(
            jnp.float32(1), loss_scale=SCALE
        )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("argnums", [0, (0,)])
@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"dropout": True}, ("'dropout/rngs/", "uint32", "in args[0]")),
        ({"norm": True}, ("changes", "'args[0]/norm/", "BatchStat", "model.eval()")),
    ],
)
def test_an_nnx_model_that_jax_cannot_differentiate_names_nnx(
    kwargs, words, argnums, jit
):
    def step(model):
        return jaxmp.value_and_grad(loss_fn, argnums)(model, loss_scale=SCALE)

    with pytest.raises(TransformError) as error:
        (jax.jit(step) if jit else step)(Network(**kwargs))
    for word in (*words, "transform=nnx.value_and_grad"):
        assert word in str(error.value)


def test_so_does_a_model_beside_the_parameters():
    def with_teacher(w, teacher, x):
        return jnp.mean((teacher(x) - w) ** 2)

    step = jaxmp.value_and_grad(with_teacher)
    with pytest.raises(TransformError, match="BatchStat"):
        step(jnp.float32(1), Network(norm=True), X, loss_scale=SCALE)
    teacher = Network(norm=True)
    teacher.eval()
    loss, _ = step(jnp.float32(1), teacher, X, loss_scale=SCALE)
    np.testing.assert_allclose(loss, with_teacher(1.0, teacher, X), rtol=1e-6)


def test_a_model_that_changes_nothing_needs_no_transform():
    for model in (Network(), Network(norm=True)):
        model.eval()
        expected = jax.value_and_grad(loss_fn)(model)
        actual = jaxmp.value_and_grad(loss_fn)(model, loss_scale=SCALE)
        for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_array_equal(x, y)


class Layer(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    @nnx.remat
    def __call__(self, x):
        return jnp.tanh(self.linear(x))


def test_a_model_merged_from_its_state_may_recompute_its_layers():
    graph, state = nnx.split(Layer())

    def loss(state, x):
        return jnp.mean(nnx.merge(graph, state)(x))

    found, grads = jaxmp.value_and_grad(loss)(state, X, loss_scale=SCALE)
    expected, wanted = jax.value_and_grad(loss)(state, X)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(same, grads, wanted)
