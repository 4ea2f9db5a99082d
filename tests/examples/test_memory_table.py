"""The models of the memory table: their sizes by hand, and every way to train them."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ways
from models import JOBS, TINY_JOBS, transformer_xl

from jaxmp.testing import matmuls

HALF = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}
WAYS = {
    "by hand": ways.by_hand,
    "jmp": ways.with_jmp,
    "autocast": functools.partial(ways.with_jaxmp, autocast=True),
    "apply_policy": functools.partial(ways.with_jaxmp, autocast=False),
}
# Unit roundoff of the dtype, and the steps that follow each other.
TOLERANCES = {"bfloat16": 2**-8, "float16": 2**-11}


def dense(inputs, outputs, bias=True):
    return inputs * outputs + bias * outputs


def transformer_layer(width):
    """Four projections, a hidden layer four times as wide, two norms."""
    hidden = dense(width, 4 * width) + dense(4 * width, width)
    return 4 * dense(width, width) + hidden + 2 * 2 * width


def bert_base():
    embeddings = (30522 + 512 + 2) * 768 + 2 * 768
    return embeddings + 12 * transformer_layer(768) + dense(768, 768) + 2 * 768 + 30522


def gpt2_small():
    return (50257 + 1024) * 768 + 12 * transformer_layer(768) + 2 * 768


def resnet_50():
    count, channels = 7 * 7 * 3 * 64 + 2 * 64, 64
    for blocks, filters in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        count += channels * 4 * filters + 2 * 4 * filters  # projection
        for _ in range(blocks):
            count += channels * filters + 9 * filters**2 + 4 * filters**2
            count += 2 * (filters + filters + 4 * filters)
            channels = 4 * filters
    return count + dense(2048, 1000)


def transformer_xl_base():
    attention = (3 + 1 + 1) * dense(410, 410, bias=False)
    hidden = dense(410, 2100) + dense(2100, 410)
    clusters = 3 * (410 + 1)
    layers = 16 * (attention + hidden + 2 * 2 * 410) + 2 * 410
    return 267735 * 410 + 267735 + clusters + layers


@pytest.mark.parametrize(
    ("name", "by_hand", "millions"),
    [
        ("BERT-Base", bert_base, 109.5),
        ("GPT-2 small", gpt2_small, 124.4),
        ("ResNet-50", resnet_50, 25.6),
        ("Transformer-XL base", transformer_xl_base, 151.1),
    ],
)
def test_a_model_has_the_parameters_of_its_paper(name, by_hand, millions):
    state = jax.eval_shape(ways.plain(JOBS[name]).init, jax.random.key(0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    assert count == by_hand()
    assert round(count / 1e6, 1) == millions
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}


def test_the_batches_are_those_in_the_table():
    def shapes(name):
        inputs, labels = jax.eval_shape(JOBS[name].batch, jax.random.key(0))
        return [x.shape for x in jax.tree.leaves((inputs, labels))]

    assert shapes("BERT-Base") == [(32, 512)] * 4
    assert shapes("GPT-2 small") == [(8, 1024)] * 2
    assert shapes("ResNet-50") == [(64, 224, 224, 3), (64,)]
    assert shapes("Transformer-XL base") == [(60, 150)] * 2


@functools.cache
def losses(model, way=None, dtype=None, steps=3):
    """The losses of the first steps on one batch, and the state after them."""
    job = TINY_JOBS[model]
    training = WAYS[way](job, HALF[dtype]) if way else ways.plain(job)
    # Compiling is what takes time here.
    options = {"xla_backend_optimization_level": 0}
    step = jax.jit(training.step, donate_argnums=0, compiler_options=options)
    state = jax.jit(training.init, compiler_options=options)(jax.random.key(0))
    batch = job.batch(jax.random.key(1))
    history = []
    for _ in range(steps):
        state, loss = step(state, batch)
        history.append(float(loss))
    return np.array(history), state


def cases():
    """Every model, way and dtype; those of a default run are jaxmp's in bfloat16."""
    for case in itertools.product(TINY_JOBS, WAYS, HALF):
        usual = case[0] != "BERT-Base" and case[1] in ("autocast", "apply_policy")
        fast = usual and case[2] == "bfloat16"
        yield pytest.param(*case, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("model", "way", "dtype"), list(cases()))
def test_every_way_trains_as_float32_does(model, way, dtype):
    expected, reference = losses(model)
    found, state = losses(model, way, dtype)
    assert np.all(np.diff(expected) < 0)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCES[dtype])
    for new, old in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(reference.params), strict=True
    ):
        assert new.dtype == old.dtype == jnp.float32
        assert new.shape == old.shape


def multiplied_dtypes(training, job):
    """The dtypes of what a training step multiplies."""
    state = jax.eval_shape(training.init, jax.random.key(0))
    batch = jax.eval_shape(job.batch, jax.random.key(0))
    found = matmuls(jax.make_jaxpr(training.step)(state, batch))
    return {dtype.name for matmul in found for dtype in matmul.operands}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", TINY_JOBS)
def test_every_way_multiplies_in_half_only(model, way):
    job = TINY_JOBS[model]
    assert multiplied_dtypes(ways.plain(job), job) == {"float32"}
    assert multiplied_dtypes(WAYS[way](job, jnp.bfloat16), job) == {"bfloat16"}


# Transformer-XL's own parts


def test_relative_shift_turns_distances_into_keys():
    queries, keys = 3, 5
    x = jnp.arange(queries * keys).reshape(1, queries, keys)
    shifted = transformer_xl.relative_shift(x)
    for i in range(queries):
        # The key under a query is at distance 0, the last of the distances.
        for j in range(keys - queries + i + 1):
            distance = keys - queries + i - j
            assert shifted[0, i, j] == x[0, i, keys - 1 - distance]


def test_adaptive_softmax_is_a_distribution_over_the_vocabulary():
    vocabulary = 12
    module = transformer_xl.AdaptiveSoftmax(cutoffs=(4, 6), room=1)
    table = jax.random.normal(jax.random.key(0), (vocabulary, 8))
    x = jnp.broadcast_to(jnp.arange(8.0), (vocabulary, 8)) / 8
    labels = jnp.arange(vocabulary)
    variables = module.init(jax.random.key(1), x, labels, table)
    variables = jax.tree.map(lambda v: v + 0.1, variables)
    probabilities = jnp.exp(-module.apply(variables, x, labels, table))
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-6)


def test_transformer_xl_remembers_the_segment_before():
    job = TINY_JOBS["Transformer-XL base"]
    inputs, _ = job.batch(jax.random.key(1))
    model = job.model()
    apply = jax.jit(functools.partial(model.apply, mutable=["memory"]))
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    fresh, memory = apply(variables, *inputs)
    (hidden,) = jax.tree.leaves(memory)
    assert hidden.shape == (4, 16, 32)
    assert jnp.all(jnp.any(hidden != 0, axis=-1))
    later, _ = apply({**variables, **memory}, *inputs)
    assert not jnp.allclose(fresh, later)
