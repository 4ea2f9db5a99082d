"""`value_and_grad(micro_batches=k)`: the result of a batch, the memory of a part."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxmp
from jaxmp.errors import MicroBatchError
from jaxmp.optimizers import accumulate

SCALE = jaxmp.StaticLossScale(1024)
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.zeros(3)}


def batch(size=8):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(size, 4)), jnp.float32)
    return {"x": x, "y": jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)}


def loss_fn(params, batch):
    predicted = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    return jnp.mean((predicted - batch["y"]) ** 2)


def with_aux(params, batch):
    predicted = batch["x"] @ params["w"]
    aux = {"mean": predicted.mean(0), "each": predicted[:, 0], "count": jnp.int32(7)}
    return jnp.mean(predicted**2), aux


def close(x, y, rtol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), x, y
    )


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_it_is_the_whole_batch_to_rounding(count):
    whole = jaxmp.value_and_grad(loss_fn)(PARAMS, batch(), loss_scale=SCALE)
    parts = jaxmp.value_and_grad(loss_fn, micro_batches=count)
    close(jax.jit(parts)(PARAMS, batch(), loss_scale=SCALE), whole)


def test_grad_takes_it_too():
    whole = jaxmp.grad(loss_fn)(PARAMS, batch(), loss_scale=SCALE)
    parts = jaxmp.grad(loss_fn, micro_batches=4)(PARAMS, batch(), loss_scale=SCALE)
    close(parts, whole)


def test_it_is_what_accumulate_makes_of_the_same_parts():
    data, tx = batch(), accumulate(optax.sgd(1.0), 4)
    state = tx.init(PARAMS)
    params = PARAMS
    for i in range(4):
        part = jax.tree.map(lambda x: x[i::4], data)  # noqa: B023
        _, grads = jaxmp.value_and_grad(loss_fn)(PARAMS, part, loss_scale=SCALE)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    grads = jaxmp.grad(loss_fn, micro_batches=4)(PARAMS, data, loss_scale=SCALE)
    close(params, jax.tree.map(lambda p, g: p - g, PARAMS, grads))


def test_gradients_are_summed_in_float32():
    def sum_fn(w, x):
        return jnp.mean(w * x)

    w, x = jnp.ones((), jnp.bfloat16), jnp.ones(4096, jnp.bfloat16)
    _, grads = jaxmp.value_and_grad(sum_fn, micro_batches=4096)(w, x, loss_scale=SCALE)
    assert grads.dtype == jnp.float32
    assert float(grads) == 1.0


@pytest.mark.parametrize("kind", ["stack", "mean"])
def test_auxiliary_outputs(kind):
    data = batch()
    differentiate = jaxmp.value_and_grad(
        with_aux, has_aux=True, micro_batches=4, micro_batch_aux=kind
    )
    (_, aux), _ = differentiate(PARAMS, data, loss_scale=SCALE)
    _, whole = with_aux(PARAMS, data)
    if kind == "mean":
        close(aux["mean"], whole["mean"])
        assert int(aux["count"]) == 7
    else:
        assert aux["mean"].shape == (4, 3)
        assert aux["count"].tolist() == [7] * 4
        # Part j holds the examples j, j + 4: this is their order again.
        close(aux["each"].swapaxes(0, 1).reshape(8), whole["each"])


def test_one_overflow_makes_the_whole_gradient_non_finite():
    data = batch()
    data["x"] = data["x"].at[5, 2].set(jnp.inf)
    _, grads = jaxmp.value_and_grad(loss_fn, micro_batches=4)(
        PARAMS, data, loss_scale=SCALE
    )
    assert not jaxmp.all_finite(grads)


def test_the_memory_is_that_of_one_part():
    def deep(w, x):
        for _ in range(8):
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def temporaries(size, count):
        step = jaxmp.value_and_grad(deep, micro_batches=count)
        w, x = (jax.ShapeDtypeStruct((n, 64), jnp.float32) for n in (64, size))
        compiled = jax.jit(step).lower(w, x, loss_scale=SCALE).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # So large that what a library wants for itself does not count.
    size = 2**18
    part, whole = temporaries(size // 8, 1), temporaries(size, 1)
    in_parts = temporaries(size, 8)
    batch_itself = size * 64 * 4  # cut once, and therefore copied
    assert whole > 7 * part
    assert in_parts < 1.2 * part + batch_itself


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("batch_argnums", [None, (1, 2), [1, -2]])
def test_several_arguments_and_a_random_key(make_key, batch_argnums):
    def noisy(w, x, key, offset):
        noise = jax.random.normal(key, x.shape)
        return jnp.mean(w * (x + noise) + offset), noise

    step = jaxmp.value_and_grad(
        noisy, has_aux=True, micro_batches=2, batch_argnums=batch_argnums
    )
    (_, noise), _ = step(jnp.ones(()), jnp.zeros(6), make_key(0), 1.0, loss_scale=SCALE)
    assert noise.shape == (2, 3)
    assert (noise[0] != noise[1]).all()


# Which arguments are cut, if nobody says so


def mse(params, x, y, mask=None, *, weight=1.0, kind="mean", extra=None):
    assert kind == "mean"
    predicted = jnp.tanh(x @ params["w"] + params["b"][None])
    errors = jnp.mean((predicted - y) ** 2, -1)
    errors = errors if mask is None else errors * mask
    return weight * jnp.mean(errors if extra is None else errors + extra["offset"])


MASK = jnp.arange(8.0)
X, Y = batch()["x"], batch()["y"]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((PARAMS, X, Y), {}),
        ((PARAMS, X, Y, MASK), {}),
        ((PARAMS, X, Y, None), {"weight": 0.5}),
        ((PARAMS, X), {"y": Y, "mask": MASK, "kind": "mean"}),
        ((PARAMS,), {"x": X, "y": np.asarray(Y), "weight": jnp.float32(2)}),
        ((PARAMS, X, Y), {"extra": {"offset": MASK, "name": None, "n": jnp.int32(1)}}),
    ],
)
def test_every_batch_argument_is_cut(args, kwargs):
    whole = jax.value_and_grad(mse)(*args, **kwargs)
    parts = jaxmp.value_and_grad(mse, micro_batches=4)
    close(parts(*args, **kwargs, loss_scale=SCALE), whole)


@pytest.mark.parametrize("argnums", [1, -1, (1,), (1, 2)])
def test_what_is_differentiated_is_not_cut_wherever_it_stands(argnums):
    def fun(x, params, bias):
        return jnp.mean((x @ params["w"] + params["b"][None] + bias) ** 2)

    if argnums == -1:
        fun, args = (lambda x, p: mse(p, x, 0.0)), (X, PARAMS)
    else:
        args = (X, PARAMS, jnp.ones((8, 3)) if argnums == (1,) else jnp.float32(1))
    whole = jax.value_and_grad(fun, argnums)(*args)
    parts = jaxmp.value_and_grad(fun, argnums, micro_batches=4)
    close(parts(*args, loss_scale=SCALE), whole)


class Linear(nnx.Module):
    def __init__(self, features):
        self.w = nnx.Param(jnp.linspace(-1.0, 1.0, 4 * features).reshape(4, features))


def states():
    tx = jaxmp.loss_scaling(optax.adam(0.1), "float32")
    return {
        "nnx module": Linear(3),
        "nnx state": nnx.state(Linear(3)),
        "equinox module": eqx.nn.Linear(4, 3, key=jax.random.key(0)),
        "TrainState": jaxmp.TrainState.create(
            apply_fn=None, params=PARAMS, tx=tx, policy="float32"
        ),
        "optimizer state": tx.init(PARAMS),
        "batch_stats": {"BatchNorm_0": {"mean": jnp.ones(3), "var": jnp.ones(3)}},
        "in a dictionary": {"teacher": Linear(3), "temperature": 2.0},
    }


@pytest.mark.parametrize("name", states())
def test_models_and_states_are_not_cut(name):
    def fun(params, state, x, y):
        weights = [p for p in jax.tree.leaves(state) if jnp.ndim(p)]
        return mse(params, x, y) + sum(jnp.sum(p) for p in weights)

    args = (PARAMS, states()[name], X, Y)
    parts = jaxmp.value_and_grad(fun, micro_batches=4)
    close(parts(*args, loss_scale=SCALE), jax.value_and_grad(fun)(*args))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            (PARAMS, X, Y, jnp.ones((1, 8))),
            ("args[1] has the shape [8, 4]", "args[3] [1, 8]", "batch_argnums=(1, 2)"),
        ),
        ((PARAMS, X, Y[:4]), ("args[1]", "args[2] [4, 3]", "batch_argnums=1")),
        ((PARAMS, X, [0.0] * 8), ("args[2] holds 8 Python numbers", "jnp.asarray")),
        (
            (PARAMS, X, Y, {"norm": {"mean": jnp.ones(8), "var": jnp.ones(8)}}),
            ("args[3]", "state or a part of the batch", "batch_argnums=(1, 2, 3)"),
        ),
        ((PARAMS, 1.0, jnp.float32(2)), ("nothing to cut", "batch_argnums=1")),
        ((PARAMS, Linear(3), 0.0), ("nothing to cut", "args[1] are passed whole")),
        (
            (PARAMS, X[:2], Y[:2], jax.random.PRNGKey(0)),
            ("args[3] is uint32[2]", "jax.random.key"),
        ),
    ],
)
def test_what_may_be_no_batch_is_an_error_that_names_it(args, words):
    with pytest.raises(MicroBatchError) as error:
        jaxmp.value_and_grad(mse, micro_batches=2)(*args, loss_scale=SCALE)
    for word in words:
        assert word in str(error.value)


def test_a_mask_of_another_first_axis_is_passed_whole_if_the_batch_is_named():
    def fun(params, x, y, mask, *, z):
        return mse(params, x, y) * jnp.sum(mask) + jnp.mean(z)

    args = (PARAMS, X, Y, jnp.ones((1, 5)))
    parts = jaxmp.value_and_grad(fun, micro_batches=4, batch_argnums=(1, 2, "z"))
    whole = jax.value_and_grad(fun)(*args, z=MASK)
    close(parts(*args, z=MASK, loss_scale=SCALE), whole)


def test_scales_of_float8_layers_are_the_largest_of_any_part():
    layer = nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    x = jnp.ones((64, 16)).at[17].set(5.0)  # in the second part of four
    variables = layer.init(jax.random.key(0), x)
    loss = lambda v, x: jnp.mean(layer.apply(v, x) ** 2)  # noqa: E731
    grads = jaxmp.grad(loss, micro_batches=4)(variables, x, loss_scale=SCALE)
    whole = jaxmp.grad(loss)(variables, x, loss_scale=SCALE)
    for found in (grads, whole):
        (scales,) = found["_overwrite_with_gradient"].values()
        assert float(scales["input_amax_history"].max()) == 5
        assert scales["input_amax_history"].dtype == jnp.float32
    np.testing.assert_allclose(
        grads["params"]["bias"], whole["params"]["bias"], rtol=0.1
    )


def test_integer_leaves_have_no_gradient():
    def fun(params, x):
        return jnp.mean(params["w"] * x) + 0 * params["n"].astype(jnp.float32)

    params = {"w": jnp.ones(()), "n": jnp.int32(3)}
    step = jaxmp.value_and_grad(fun, micro_batches=2, allow_int=True)
    _, grads = jax.jit(step)(params, jnp.arange(4.0), loss_scale=SCALE)
    assert grads["n"].dtype == jax.dtypes.float0
    assert float(grads["w"]) == 1.5


def test_a_sharded_batch_stays_where_it_is():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    data = jax.device_put(batch(64), rows)
    step = jax.jit(jaxmp.value_and_grad(loss_fn, micro_batches=4))
    text = step.lower(PARAMS, data, loss_scale=SCALE).compile().as_text()
    assert "all-to-all" not in text
    assert "all-gather" not in text
    close(
        step(PARAMS, data, loss_scale=SCALE),
        jaxmp.value_and_grad(loss_fn)(PARAMS, batch(64), loss_scale=SCALE),
    )


def test_a_split_nnx_model():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    def fun(params, batch):
        return jnp.mean((nnx.merge(graph, params)(batch["x"]) - batch["y"]) ** 2)

    whole = jaxmp.value_and_grad(fun)(params, batch(), loss_scale=SCALE)
    parts = jaxmp.value_and_grad(fun, micro_batches=4)
    close(parts(params, batch(), loss_scale=SCALE), whole)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"micro_batches": 0}, "micro_batches=0.*integer of at least 1"),
        ({"micro_batches": 2.0}, "micro_batches=2.0"),
        ({"micro_batches": 3}, r"args\[1\]/x has the shape \[8, 4\], which 3"),
        (
            {"micro_batches": 2, "batch_argnums": 2},
            "argument 2, and there are 2 by position",
        ),
        ({"micro_batches": 2, "micro_batch_aux": "sum"}, "'sum'.*'stack'.*'mean'"),
    ],
)
def test_what_cannot_be_cut_is_an_error(kwargs, message):
    with pytest.raises(MicroBatchError, match=message):
        jaxmp.value_and_grad(loss_fn, **kwargs)(PARAMS, batch(), loss_scale=SCALE)
