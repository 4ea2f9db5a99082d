"""GPT-2 small, written in plain float32 Flax: what autocast saves on an H100 and a v5e.

The model names no dtype. The programs are compiled by XLA's own H100 and TPU compilers,
which need `pip install 'jaxmp[targets]'` and neither machine:

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 \\
        python examples/benchmarks/autocast_gpt2.py --target h100 --mode autocast
"""

import argparse
import sys
import time
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxmp
from jaxmp.report import compile_for, targets

GIB = 2.0**30


class Block(nn.Module):
    """A pre-norm transformer block; `dtype` is for the model by hand."""

    heads: int = 12
    dtype: object = None

    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape
        h = nn.LayerNorm(dtype=self.dtype)(x)
        qkv = nn.Dense(3 * width, dtype=self.dtype)(h)
        q, k, v = jnp.split(qkv.reshape(batch, length, self.heads, -1), 3, axis=-1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1]).astype(
            self.dtype or x.dtype
        )
        causal = jnp.tril(jnp.ones((length, length), bool))
        scores = jnp.where(causal[None, None], scores, jnp.finfo(scores.dtype).min)
        h = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + nn.Dense(width, dtype=self.dtype)(h.reshape(x.shape))
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = jax.nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(h))
        return x + nn.Dense(width, dtype=self.dtype)(h)


class GPT2(nn.Module):
    """GPT-2 small by default."""

    vocabulary: int = 50257
    length: int = 1024
    width: int = 768
    layers: int = 12
    dtype: object = None

    @nn.compact
    def __call__(self, tokens):
        tokens_table = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        positions = nn.Embed(self.length, self.width, dtype=self.dtype)
        x = tokens_table(tokens) + positions(jnp.arange(tokens.shape[1]))[None]
        for _ in range(self.layers):
            x = Block(dtype=self.dtype)(x)
        return tokens_table.attend(nn.LayerNorm(dtype=self.dtype)(x))


def make_step(mode, model_args=()):
    """The training step of a mode, and abstract arguments for it."""
    model_args = dict(model_args)
    if mode == "by-hand":
        model_args["dtype"] = jnp.bfloat16
    model = GPT2(**model_args)
    optimizer = optax.adamw(1e-4)

    def loss_fn(params, tokens):
        logits = model.apply(params, tokens[:, :-1])
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        ).mean()

    if mode.startswith("autocast"):
        half = mode != "autocast-float32-residuals"
        named = mode != "autocast-unnamed"
        loss_fn = jaxmp.autocast(
            loss_fn, "mixed_bfloat16", half_residuals=half, named_scopes=named
        )

    def step(params, opt_state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    tokens = jax.ShapeDtypeStruct((8, model.length + 1), jnp.int32)
    inputs = jax.ShapeDtypeStruct((8, model.length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return step, (params, jax.eval_shape(optimizer.init, params), tokens)


def step_of_policy(policy):
    """As `python -m jaxmp report` takes it: float32, or autocast."""
    mode = "float32" if policy == "float32" else "autocast"
    step, args = make_step(mode)
    return jax.jit(step, donate_argnums=(0, 1)), *args


class Memory(NamedTuple):
    """What a compiled step needs, in GiB; an H100 tells no traffic."""

    arguments: float
    temp: float
    accessed: float


def measure(mode, target, layers=12):
    """Compiles the training step of a mode for a target."""
    step, args = make_step(mode, {"layers": layers})
    compiled = compile_for(target, step, *args, donate_argnums=(0, 1))
    memory = compiled.memory_analysis()
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed", 0)
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, accessed
    return Memory(*(size / GIB for size in sizes))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="h100", choices=targets())
    parser.add_argument(
        "--mode",
        default="autocast",
        choices=(
            *("float32", "by-hand", "autocast"),
            *("autocast-float32-residuals", "autocast-unnamed"),
        ),
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--lower-only", action="store_true", help="time tracing only")
    arguments = parser.parse_args(argv)
    if arguments.lower_only:
        step, args = make_step(arguments.mode, {"layers": arguments.layers})
        times = []
        for _ in range(5):
            start = time.process_time()
            jax.jit(lambda *a: step(*a), donate_argnums=(0, 1)).lower(*args)
            times.append(time.process_time() - start)
        print(f"{arguments.mode}: {min(times):.2f} s of CPU to trace and lower")
        return
    memory = measure(arguments.mode, arguments.target, arguments.layers)
    print(
        f"{arguments.target} {arguments.mode}: arguments {memory.arguments:.2f} GiB, "
        f"temp {memory.temp:.2f} GiB, accessed {memory.accessed:.1f} GiB"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
