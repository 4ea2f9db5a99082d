"""Which dtypes the examples compute in, and what a skipped step leaves alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runner
import train_digits
import train_lm
from flax import nnx

import jaxmp

POLICIES = ["float32", "mixed_float16", "mixed_bfloat16", "bf16-true"]
NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def prepare(example, policy):
    args = runner.read_flags(example.EXPERIMENT, ["--steps", "10"])
    return example.prepare(jaxmp.get_policy(policy), args)


@pytest.mark.filterwarnings("ignore::jaxmp.errors.HalfParamsWarning")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("example", [train_lm, train_digits])
def test_every_matmul_is_in_the_compute_dtype(example, policy):
    training = prepare(example, policy)
    jaxpr = jax.make_jaxpr(training.train_step)(training.state, training.batch(0))
    operations = re.findall(
        r":(\w+)\[[\d,]*\] = (?:dot_general|conv_general_dilated)\[", str(jaxpr)
    )
    compute = NAMES[jaxmp.get_policy(policy).compute_dtype.name]
    assert len(operations) > 10
    assert set(operations) == {compute}


@pytest.mark.parametrize("example", [train_lm, train_digits])
def test_a_batch_depends_on_its_step_only(example):
    first, second = prepare(example, "float32"), prepare(example, "mixed_float16")
    for step in (0, 7):
        same = jax.tree.map(np.array_equal, first.batch(step), second.batch(step))
        assert jax.tree.all(same)
    differ = jax.tree.map(np.array_equal, first.batch(0), first.batch(1))
    assert not jax.tree.all(differ)


def test_a_skipped_step_leaves_weights_and_batchnorm_statistics_alone():
    training = prepare(train_digits, "mixed_float16")
    images, labels = training.batch(0)
    step = jax.jit(training.train_step)
    before, _ = step(training.state, (images, labels))
    after, metrics = step(before, (np.full_like(images, 60000), labels))
    assert not metrics["applied"]
    for old, new in zip(*map(jax.tree.leaves, (before[0], after[0])), strict=True):
        np.testing.assert_array_equal(old, new)
    moved, metrics = step(before, training.batch(1))
    assert metrics["applied"]
    for state in (before, moved):
        for x in jax.tree.leaves(nnx.state(state[0], nnx.BatchStat)):
            assert x.dtype == jnp.float32
    assert not np.array_equal(before[0].norms[0].mean, moved[0].norms[0].mean)


def test_no_paragraph_is_both_trained_on_and_held_out():
    paragraphs = train_lm.reference_text(seed=0).split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) > 1000
    assert paragraphs == train_lm.reference_text(seed=0).split("\n\n")
    assert paragraphs[0] != train_lm.reference_text(seed=1).split("\n\n")[0]
    train, held_out, vocabulary = train_lm.load_text(seed=0)
    assert 8 < len(train) / len(held_out) < 10
    assert max(train.max(), held_out.max()) < vocabulary


def test_the_loss_of_frequencies_only_is_their_entropy():
    assert train_lm.entropy_of_characters(np.array([0, 1, 2, 3])) == pytest.approx(
        np.log(4)
    )
