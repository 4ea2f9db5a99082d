"""`value_and_grad(micro_batches=k)`: the result of a batch, the memory of a part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
        w, x = jnp.ones((64, 64)), jnp.ones((size, 64))
        compiled = jax.jit(step).lower(w, x, loss_scale=SCALE).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    part, whole = temporaries(512, 1), temporaries(4096, 1)
    in_parts = temporaries(4096, 8)
    batch_itself = 4096 * 64 * 4  # cut once, and therefore copied
    assert whole > 7 * part
    assert in_parts < 1.2 * part + batch_itself


def test_several_arguments_and_a_random_key():
    def noisy(w, x, key, offset):
        noise = jax.random.normal(key, x.shape)
        return jnp.mean(w * (x + noise) + offset), noise

    step = jaxmp.value_and_grad(
        noisy, has_aux=True, micro_batches=2, batch_argnums=(1, 2)
    )
    (_, noise), _ = step(
        jnp.ones(()), jnp.zeros(6), jax.random.key(0), 1.0, loss_scale=SCALE
    )
    assert noise.shape == (2, 3)
    assert (noise[0] != noise[1]).all()


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
        ({"micro_batches": 0}, "micro_batches=0.*integer from 1"),
        ({"micro_batches": 2.0}, "micro_batches=2.0"),
        ({"micro_batches": 3}, r"args\[1\]/x has the shape \[8, 4\], which 3"),
        ({"micro_batches": 2, "batch_argnums": 2}, "argument 2, and there are 2"),
        ({"micro_batches": 2, "micro_batch_aux": "sum"}, "'sum'.*'stack'.*'mean'"),
    ],
)
def test_what_cannot_be_cut_is_an_error(kwargs, message):
    with pytest.raises(MicroBatchError, match=message):
        jaxmp.value_and_grad(loss_fn, **kwargs)(PARAMS, batch(), loss_scale=SCALE)
