"""Reports from the H100's and the TPUs' own compilers, in a process of their own."""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxmp import errors
from jaxmp.report import (
    chips,
    compile_for,
    compile_step,
    max_batch_size,
    target_devices,
)
from jaxmp.report.compile.targets import _DEVICE_KINDS
from jaxmp.testing import matmuls

pytestmark = pytest.mark.targets

TARGETS = ("h100", "tpu-v5e")
BATCH, LENGTH, WIDTH, HEADS, WORDS = 4, 512, 256, 4, 4096


class Block(nn.Module):
    leak: bool = False
    dtype: object = jnp.bfloat16

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(dtype=self.dtype)(x)
        q, k, v = jnp.split(nn.Dense(3 * WIDTH, dtype=self.dtype)(h), 3, axis=-1)
        q, k, v = (t.reshape(BATCH, LENGTH, HEADS, -1) for t in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        scale = np.float32(0.125) if self.leak else 0.125
        scores = scores * scale
        h = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        x = x + nn.Dense(WIDTH, dtype=self.dtype)(h.reshape(x.shape).astype(x.dtype))
        h = nn.Dense(4 * WIDTH, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(WIDTH, dtype=self.dtype)(nn.gelu(h))


class Transformer(nn.Module):
    leak: bool = False

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(WORDS, WIDTH, dtype=jnp.bfloat16)
        x = table(tokens)
        for _ in range(2):
            x = Block(self.leak)(x)
        return table.attend(x)


@functools.cache
def training_step(leak=False):
    model, optimizer = Transformer(leak), optax.adamw(1e-3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens):
        def loss_fn(params):
            logits = model.apply(params, tokens).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
            return losses.mean()

        grads = jax.grad(loss_fn)(params)
        updates, opt_state_ = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state_

    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return step, params, jax.eval_shape(optimizer.init, params), tokens


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXMP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def told(cache):
    started = time.perf_counter()
    report = compile_step(*training_step(), policies=["float32"], targets=TARGETS)
    return report, time.perf_counter() - started


@pytest.mark.parametrize("target", TARGETS)
def test_the_figures_are_those_of_the_compiler(told, target):
    step, *args = training_step()
    compiled = compile_for(target, step, *args, donate_argnums=(0, 1))
    memory, row = compiled.memory_analysis(), told[0].row("float32", target)
    assert row.temp == memory.temp_size_in_bytes
    assert row.arguments == memory.argument_size_in_bytes
    costs = compiled.cost_analysis() or {}
    assert row.accessed == costs.get("bytes accessed")
    assert row.flops == costs.get("flops")


@pytest.mark.parametrize("target", TARGETS)
def test_every_matmul_of_the_step_is_counted_in_its_dtype(told, target):
    step, *args = training_step()
    count = len(matmuls(jax.make_jaxpr(step)(*args)))
    contents = told[0].row("float32", target).contents
    assert contents.matmuls["bfloat16"].times == count
    # Three times the forward pass; the gradient of the tokens is none.
    rows = BATCH * LENGTH
    dense = rows * WIDTH * (3 + 1 + 4 + 4) * WIDTH
    attention = 2 * BATCH * LENGTH * LENGTH * WIDTH
    flops = 3 * 2 * (2 * (dense + attention) + rows * WIDTH * WORDS)
    assert contents.matmuls["bfloat16"].amount == flops


@pytest.mark.parametrize("target", TARGETS)
def test_the_buffers_are_arguments_or_have_a_line(told, target):
    row = told[0].row("float32", target)
    made = [buffer for buffer in row.buffers if buffer.source]
    given = {b.name.split("/")[0] for b in row.buffers if not b.source}
    assert all("test_report.py" in buffer.source for buffer in made)
    assert given <= {"params", "opt_state", "tokens"}


# A TPU keeps most of a program this small in its own memory.
def test_the_buffers_explain_the_peak(told):
    row = told[0].row("float32", "h100")
    assert 0.4 * row.peak < sum(buffer.bytes for buffer in row.buffers) < row.peak


@pytest.mark.parametrize("target", TARGETS)
def test_the_estimate_is_a_bound_by_hand(told, target):
    row = told[0].row("float32", target)
    estimate, chip = row.roofline, chips[target]
    assert estimate.flops == row.contents.matmuls["bfloat16"].amount
    at_the_peaks = (estimate.cost - estimate.launch_cost) / chip.bandwidth
    assert at_the_peaks >= estimate.flops / chip.matmul_rate("bfloat16")
    assert at_the_peaks >= 0.999 * estimate.bytes / chip.bandwidth
    assert 1 <= estimate.largest_gain <= 2.001
    assert (estimate.seconds is None) == (target != "h100")
    # Nothing is read twice: what is more are arguments and results.
    assert estimate.bytes < 1.2 * (row.accessed or float("inf"))


def test_a_report_takes_little_longer_than_its_compilers(told):
    report, seconds = told
    compiling = sum(row.seconds_to_compile for row in report.rows)
    # The process itself has to import JAX and to load two compilers.
    assert seconds < 1.1 * compiling + 20


def test_a_leak_costs_what_the_report_shows(told):
    leaking = compile_step(
        *training_step(leak=True), policies=["float32"], targets=["tpu-v5e"]
    ).rows[0]
    assert leaking.contents.matmuls["float32"].times > 0
    assert leaking.accessed > 1.03 * told[0].row("float32", "tpu-v5e").accessed


def test_a_step_that_does_not_fit_is_a_row(cache):
    x = jax.ShapeDtypeStruct((65536, 65536), jnp.float32)
    rows = compile_step(
        lambda x: jnp.sin(x @ x) @ x, x, policies=["float32"], targets=["tpu-v5e"]
    ).rows
    assert rows[0].fits is False
    assert rows[0].peak is None
    assert "exceeds available HBM (15.75G)" in rows[0].message


def test_the_largest_batch_fits_and_the_next_does_not(cache):
    def step_of_batch(batch):
        return jnp.tanh, jax.ShapeDtypeStruct((batch, 2**28), jnp.float32)

    found = max_batch_size(step_of_batch, target="h100", tolerance=0)
    # One array in, one out, of a GiB each for every example.
    assert found.batch == chips["h100"].memory // (2 * 2**30)
    assert found.tried[found.batch]
    assert not found.tried[found.batch + 1]
    assert len(found.tried) <= 6
    none = max_batch_size(step_of_batch, target="h100", multiple_of=1000)
    assert none.batch == 0


@pytest.mark.parametrize("target", ["h100:4", "tpu-v6e"])
def test_a_sharded_step_has_its_collectives_in_the_dtype_of_its_gradients(
    cache, target
):
    mesh = AbstractMesh((4,), ("data",))

    def shaped(*shape, spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def step(w, x):
        return w - jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)

    args = shaped(512, 256, spec=()), shaped(1024, 512, spec=("data",))
    report = compile_step(
        step, *args, policies=["float32", "mixed_bfloat16"], targets=[target]
    )
    whole, half = (row.contents.collectives for row in report.rows)
    assert {one.group for one in (*whole, *half)} == {4}
    gradients = 512 * 256 * 4
    assert gradients <= sum(one.bytes for one in whole) < 1.1 * gradients
    assert any(one.dtype == "bfloat16" for one in half)
    assert sum(one.wire for one in half) < 0.75 * sum(one.wire for one in whole)
    (finding,) = report.rows[1].findings
    assert finding.kind == "reduced-in-half"
    assert "test_report.py" in finding.source.file


def test_a_compiler_that_fails_says_what_it_was_given(cache):
    from jaxmp.report.compile import _compiler
    from jaxmp.report.compile._programs import export_program
    from jaxmp.report.compile.targets import read_target

    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    program = export_program(jnp.tanh, (x,), read_target("h100"))
    broken = program._replace(written=program.written[: len(program.written) // 2])
    with pytest.raises(errors.CompilerFailed, match=r"'h100' was given a program of"):
        _compiler.compile_programs([broken], cache=False)


def test_a_loop_is_counted_as_often_as_it_runs(cache):
    def step(w, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, 7)[0]

    args = (jax.ShapeDtypeStruct((256, 256), jnp.bfloat16),) * 2
    report = compile_step(step, *args, policies=["float32"], targets=TARGETS)
    for row in report.rows:
        assert row.contents.matmuls["bfloat16"].amount == 7 * 2 * 256**3


def test_convolutions_are_counted(cache):
    def step(kernel, x):
        def loss(kernel):
            out = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(kernel)

    args = (
        jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((8, 34, 34, 64), jnp.bfloat16),
    )
    report = compile_step(step, *args, policies=["float32"], targets=TARGETS)
    forward = 2 * 8 * 32 * 32 * 64 * 9 * 64
    for row in report.rows:
        assert sum(t.amount for t in row.contents.matmuls.values()) == 2 * forward


@pytest.mark.parametrize("name", [*_DEVICE_KINDS])
def test_a_program_is_lowered_for_what_a_targets_devices_call_themselves(name):
    assert {device.device_kind for device in target_devices(name)} == {
        _DEVICE_KINDS[name]
    }
