"""The last bad step is kept, bit by bit, and runs again as it ran."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.errors import MissingLossScale, NotOnHost, NumericsError
from jaxmp.numerics import (
    BadBatch,
    load_bad_batch,
    no_bad_batch,
    record_bad_batch,
)

PARAMS = {"w": jnp.linspace(-1, 1, 4), "b": jnp.float32(-0.0)}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] * params["w"] + params["b"]) ** 2)


def batches():
    for i in range(7):
        x = np.full(4, 0.1 * i, np.float32)
        if i in (2, 4):
            x[i - 1] = np.inf
        yield {"x": jnp.asarray(x), "n": jnp.int32(i), "key": jax.random.key(i)}


@functools.cache
def history(with_params=True):
    """The records of a run, and of each step what went in."""
    tx = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16")

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, state, record, batch):
        loss, grads = jaxmp.value_and_grad(loss_fn)(params, batch, loss_scale=state)
        updates, new_state = tx.update(grads, state, params, value=loss)
        kept = params if with_params else None
        record = record_bad_batch(
            record, new_state, batch=batch, params=kept, loss_scale=state
        )
        return optax.apply_updates(params, updates), new_state, record

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    first = next(batches())
    record = no_bad_batch(batch=first, params=params if with_params else None)
    records, inputs = [copied(record)], []
    for batch in batches():
        scale = float(jaxmp.get_loss_scale(state))
        inputs.append((copied(params), batch, scale))
        params, state, record = step(params, state, record, batch)
        records.append(copied(record))
    assert step._cache_size() == 1
    return records, inputs


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def assert_same(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == w.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, w = jax.random.key_data(a), jax.random.key_data(w)
        assert np.asarray(a).tobytes() == np.asarray(w).tobytes()


def test_the_record_is_the_last_step_that_was_skipped():
    records, inputs = history()
    for i, record in enumerate(records):
        bad = 4 if i >= 5 else 2 if i >= 3 else None
        if bad is None:
            assert int(record.step) == 0
            continue
        params, batch, scale = inputs[bad]
        assert int(record.step) == bad + 1
        assert float(record.loss_scale) == scale
        assert_same(record.params, params)
        assert_same(record.batch, batch)


def test_the_scale_is_that_of_before_the_back_off():
    records, _ = history()
    assert [float(records[i].loss_scale) for i in (3, 5)] == [2.0**16, 2.0**15]


def test_a_replay_is_non_finite_again():
    record = history()[0][-1]
    _, grads = jaxmp.value_and_grad(loss_fn)(
        record.params, record.batch, loss_scale=jaxmp.StaticLossScale(record.loss_scale)
    )
    assert not jaxmp.all_finite(grads)


def test_batches_alone_can_be_kept():
    records, inputs = history(with_params=False)
    assert records[-1].params is None
    assert_same(records[-1].batch, inputs[4][1])


@pytest.mark.parametrize("scale", [8.0, jnp.float32(8), jaxmp.StaticLossScale(8)])
def test_the_scale_may_be_a_number(scale):
    tx = jaxmp.loss_scaling(optax.sgd(0.1), "float32", skip_nonfinite=True)
    _, state = tx.update(jnp.float32(jnp.nan), tx.init(jnp.ones(())), jnp.ones(()))
    record = no_bad_batch(batch=jnp.ones(2))
    record = record_bad_batch(record, state, batch=jnp.ones(2), loss_scale=scale)
    assert (float(record.loss_scale), int(record.step)) == (8, 1)
    assert record.loss_scale.dtype == jnp.float32


# Files


class Named(NamedTuple):
    z: jax.Array
    a: jax.Array


ODD = BadBatch(
    batch=[
        {"11": jnp.arange(3), "2": jnp.ones((2, 3), jnp.bfloat16), "k": {}},
        (jnp.float16(1e-7), None, jax.random.key(3, impl="rbg")),
        Named(jnp.array([jnp.nan, jnp.inf]), jnp.ones(1, jnp.float8_e4m3fn)),
    ],
    params={10: jnp.ones(2, bool), 9: jnp.full(3, 1 + 2j)},
    loss_scale=jnp.float32(2.0**15),
    step=jnp.int32(7),
)


def test_a_file_gives_every_bit_and_the_structure_back(tmp_path):
    ODD.save(tmp_path / "bad.npz")
    loaded = load_bad_batch(
        tmp_path / "bad.npz", batch=ODD.batch, params=jax.eval_shape(lambda: ODD.params)
    )
    assert_same(loaded, ODD)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_without_a_structure_there_are_dictionaries_and_lists(tmp_path):
    ODD.save(tmp_path / "bad")
    loaded = load_bad_batch(tmp_path / "bad")
    first, second, third = loaded.batch
    assert sorted(first) == ["11", "2"]
    assert second[1].dtype == ODD.batch[1][2].dtype
    np.testing.assert_array_equal(third["z"], ODD.batch[2].z)
    assert sorted(loaded.params) == ["10", "9"]


def test_a_run_can_be_replayed_from_its_file(tmp_path):
    record = history()[0][-1]
    record.save(tmp_path / "bad.npz")
    assert_same(load_bad_batch(tmp_path / "bad.npz"), record)
    history(with_params=False)[0][-1].save(tmp_path / "batch.npz")
    assert load_bad_batch(tmp_path / "batch.npz").params is None


def test_an_older_file_is_replaced(tmp_path):
    ODD._replace(step=jnp.int32(1)).save(tmp_path / "bad.npz")
    ODD.save(str(tmp_path / "bad.npz"))
    assert load_bad_batch(tmp_path / "bad.npz").step == 7


# Mistakes


def test_nothing_to_save(tmp_path):
    with pytest.raises(NumericsError, match="no bad batch to save"):
        no_bad_batch(batch=jnp.ones(2)).save(tmp_path / "bad.npz")
    assert not list(tmp_path.iterdir())


def test_saving_is_for_the_host(tmp_path):
    with pytest.raises(NotOnHost, match="outside jit"):
        jax.jit(lambda record: record.save(tmp_path / "bad.npz"))(ODD._replace(batch=1))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no more", b"text"])
def test_another_file(tmp_path, content):
    (tmp_path / "other.npz").write_bytes(content)
    with pytest.raises(NumericsError, match=r"other\.npz"):
        load_bad_batch(tmp_path / "other.npz")
    np.savez(tmp_path / "array.npz", x=np.ones(2))
    with pytest.raises(NumericsError, match="is not a bad batch"):
        load_bad_batch(tmp_path / "array.npz")


def test_another_structure(tmp_path):
    ODD.save(tmp_path / "bad.npz")
    with pytest.raises(NumericsError, match=r"params in the file .*\(2,\)"):
        load_bad_batch(tmp_path / "bad.npz", params={"w": jnp.ones(5)})


def test_batches_of_another_shape():
    tx = jaxmp.loss_scaling(optax.sgd(0.1), "float32")
    record, state = no_bad_batch(batch=jnp.ones((8, 2))), tx.init(jnp.ones(2))
    with pytest.raises(NumericsError, match=r"batch of shape \(8, 2\).* \(5, 2\)"):
        record_bad_batch(record, state, batch=jnp.ones((5, 2)), loss_scale=1.0)
    with pytest.raises(NumericsError, match=r"params of shape None.* \(2,\)"):
        record_bad_batch(
            record, state, batch=jnp.ones((8, 2)), params=jnp.ones(2), loss_scale=1.0
        )


def test_a_state_without_a_scale():
    with pytest.raises(MissingLossScale):
        record_bad_batch(ODD, optax.adam(0.1).init(PARAMS), batch=1, loss_scale=1.0)
