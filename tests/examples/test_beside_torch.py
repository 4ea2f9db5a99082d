"""GPT-2 in PyTorch is the one of `models/gpt2.py`; most of it without PyTorch."""

import argparse
import math
import subprocess
import sys

import beside_torch
import gpt2_sizes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ways
from machine_process import WORKER
from machine_records import TORCH, Machine, Record, read
from models import JOBS, TINY_JOBS, gpt2

SCRIPT = WORKER.with_name("beside_torch.py")


@pytest.mark.parametrize(
    ("sizes", "jobs"), [(gpt2_sizes.SMALL, JOBS), (gpt2_sizes.TINY, TINY_JOBS)]
)
def test_the_sizes_are_those_that_flax_trains(sizes, jobs):
    job = jobs["GPT-2 small"]
    state = jax.eval_shape(ways.plain(job).init, jax.random.key(0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    assert count == sizes.parameters
    _, labels = jax.eval_shape(job.batch, jax.random.key(0))
    assert labels.shape == (sizes.batch, sizes.length)
    blocks = [name for name in state.params if name.startswith("block")]
    assert len(blocks) == sizes.layers
    query = state.params["block_0"]["MultiHeadDotProductAttention_0"]["query"]["kernel"]
    assert query.shape == (sizes.width, sizes.heads, sizes.width // sizes.heads)
    assert job.shape == sizes.shape


def test_adamw_has_the_same_numbers():
    numbers = gpt2_sizes.AdamW()
    options = beside_torch.optimizer_options(numbers, fused=False)
    params = {"w": jnp.array([1.0, -2.0])}
    grads = {"w": jnp.array([0.3, 1e-6])}
    tx = JOBS["GPT-2 small"].optimizer
    updates, _ = tx.update(grads, tx.init(params), params)
    # PyTorch's first step: decay, then the gradient over its size.
    rate, decay = options["lr"], options["weight_decay"]
    size = jnp.abs(grads["w"]) + options["eps"]
    expected = -rate * (decay * params["w"] + grads["w"] / size)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)
    assert options["betas"] == (0.9, 0.999)
    assert numbers == gpt2_sizes.AdamW(1e-4)
    assert optax.adamw(1e-3).init(params)[0].mu.keys() == params.keys()


def test_a_row_is_called_what_it_is():
    flags = argparse.Namespace(attention="sdpa", eager=True)
    found = beside_torch.name("float32", flags)
    assert found == "float32, fused attention, not compiled"


def test_a_record_is_one_line():
    machine = Machine("NVIDIA H100", "gpu", "torch 2.13")
    record = Record("GPT-2 small", "float32", machine, ms=(2.0, 3.0, 5.0), steps=6)
    record = beside_torch.line(
        Record(**{**vars(record), "compile_seconds": 40.0, "allocated": 2**31})
    )
    assert record.endswith("3.00 ms (2.00 to 5.00), 2.00 GiB, first step 40.0 s")
    failed = Record("GPT-2 small", "float32", machine, error="OutOfMemoryError: 9 GiB")
    assert beside_torch.line(failed).endswith("OutOfMemoryError: 9 GiB")


def test_without_pytorch_it_says_how_to_get_it(tmp_path):
    # An environment that cannot have it: no site-packages.
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN_WITHOUT_PACKAGES, str(SCRIPT), "--tiny"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 1
    assert "PyTorch is not installed here." in run.stderr
    assert "out/torch/bin/pip install" in run.stderr


RUN_WITHOUT_PACKAGES = """
import runpy, sys, os
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# With PyTorch


def copy_weights(torch_model, params):
    """Flax's parameters into PyTorch's modules."""
    import torch

    def put(weight, value):
        weight.data = torch.from_numpy(np.array(value, np.float32))

    def linear(module, layer, shape):
        put(module.weight, np.asarray(layer["kernel"]).reshape(shape).T)
        put(module.bias, np.asarray(layer["bias"]).ravel())

    def norm(module, layer):
        put(module.weight, layer["scale"])
        put(module.bias, layer["bias"])

    put(torch_model.tokens.weight, params["wte"]["embedding"])
    put(torch_model.positions.weight, params["wpe"]["embedding"])
    norm(torch_model.norm, params["ln"])
    for i, block in enumerate(torch_model.blocks):
        layers = params[f"block_{i}"]
        heads = layers["MultiHeadDotProductAttention_0"]
        width = block.norm_1.weight.shape[0]
        parts = [heads[name] for name in ("query", "key", "value")]
        kernels = [np.asarray(x["kernel"]).reshape(width, width).T for x in parts]
        put(block.attention.qkv.weight, np.concatenate(kernels))
        biases = [np.asarray(x["bias"]).ravel() for x in parts]
        put(block.attention.qkv.bias, np.concatenate(biases))
        linear(block.attention.out, heads["out"], (width, width))
        norm(block.norm_1, layers["LayerNorm_0"])
        norm(block.norm_2, layers["LayerNorm_1"])
        linear(block.hidden, layers["Dense_0"], (width, 4 * width))
        linear(block.out, layers["Dense_1"], (4 * width, width))


@pytest.mark.parametrize("fused", [False, True])
def test_both_models_lose_the_same(fused):
    torch = pytest.importorskip("torch")
    from torch_gpt2 import GPT2

    job, sizes = gpt2.TINY_JOB, gpt2_sizes.TINY
    inputs, labels = job.batch(jax.random.key(0))
    model = job.model()
    params = model.init(jax.random.key(1), *inputs)["params"]
    params = jax.tree.map(lambda x: x + 0.01, params)  # biases too
    expected = job.loss(model.apply({"params": params}, *inputs), labels)
    torch_model = GPT2(sizes, fused=fused)
    assert sum(w.numel() for w in torch_model.parameters()) == sizes.parameters
    copy_weights(torch_model, params)
    tokens, labels = (torch.from_numpy(np.array(x)).long() for x in (*inputs, labels))
    found = float(torch_model(tokens, labels).detach())
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_script_trains(tmp_path):
    pytest.importorskip("torch")
    command = [sys.executable, str(SCRIPT), "--tiny", "--eager", "--rounds", "2"]
    subprocess.run([*command, "--records", str(tmp_path)], check=True)
    records = read([tmp_path / TORCH])
    assert [r.way.split(",")[0] for r in records] == list(beside_torch.WAYS)
    losses = [record.loss for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=2**-8)
