"""What float8 and int8 do to the loss: the benchmark's jobs, on a few steps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized_losses
import quantized_models

QUANTIZED = "mixed_fp8:rowwise_wgrad_half"


@pytest.fixture
def small_digits(monkeypatch):
    def digits(seed):
        model = quantized_models.PatchTransformer(width=32, layers=1)
        return quantized_models.digits(seed)._replace(model=model)

    monkeypatch.setitem(quantized_models.JOBS, "digits", digits)


def test_every_policy_starts_from_the_same_weights():
    job = quantized_models.mixture_of_experts(seed=1)
    full, small = (
        quantized_losses.first_state(job, policy, steps=10).params
        for policy in ("float32", QUANTIZED)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, full, small))


@pytest.mark.parametrize(("job", "kernel"), [("digits", "16,64"), ("moe", "4,128,256")])
def test_layers_multiply_in_float8(job, kernel):
    job = quantized_models.JOBS[job](0)
    state = quantized_losses.first_state(job, QUANTIZED, steps=10)
    jaxpr = jax.make_jaxpr(quantized_losses.gradient)(state, job.batch(0))
    assert f"f8_e4m3fn[{kernel}]" in str(jaxpr)


@pytest.mark.slow
def test_the_table_has_a_row_for_each_policy(small_digits, monkeypatch, capsys):
    monkeypatch.setattr(quantized_losses, "POLICIES", ("float32", QUANTIZED))
    quantized_losses.main(["--job=digits", "--steps=2", "--seeds=1"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| policy | seed 0 | mean |")
    full, small = ([c.strip() for c in re.split(r"\|", row)[1:-1]] for row in rows)
    assert (full[0], small[0]) == ("`float32`", f"`{QUANTIZED}`")
    assert full[1] == full[2] != small[2] == small[1]
    gap = 100 * (float(small[2]) / float(full[2]) - 1)
    assert float(small[3].removesuffix(" %")) == pytest.approx(gap, abs=0.02)
    assert small[4] != small[3]
    assert (full[5], small[5]) == ("0", "0")


@pytest.mark.slow
def test_gradients_are_compared_to_those_of_float32(small_digits, monkeypatch, capsys):
    policies = ("float32", "mixed_bfloat16", "mixed_fp8")
    monkeypatch.setattr(quantized_losses, "POLICIES", policies)
    quantized_losses.main(["--job=digits", "--gradients"])
    _, _, half, small = capsys.readouterr().out.splitlines()
    errors = [float(re.search(r"([\d.]+)%", row)[1]) for row in (half, small)]
    assert 0 < errors[0] < errors[1] < 30


def test_a_token_behind_a_full_expert_is_in_none():
    router = jnp.eye(4)[:, : quantized_models.EXPERTS]
    tokens = jnp.eye(4)[jnp.array([1, 1, 0, 1, 3])]
    gate, slot, balance = quantized_models.route(tokens, router, 2)
    nowhere = 2 * quantized_models.EXPERTS
    np.testing.assert_array_equal(slot, [2, 3, 0, nowhere, 6])
    np.testing.assert_allclose(gate, np.e / (np.e + 3), rtol=1e-6)
    assert balance > 1


def test_equally_busy_experts_are_balanced():
    tokens = jnp.eye(quantized_models.EXPERTS)
    *_, balance = quantized_models.route(tokens, tokens, 1)
    assert balance == pytest.approx(1)
