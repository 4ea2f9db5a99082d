"""Prints what `jaxmp.numerics.monitor` costs a training step.

    python examples/benchmarks/monitor_cost.py
    pip install 'jaxmp[targets]'
    python examples/benchmarks/monitor_cost.py --traffic

The first runs the float16 step of the language model of `train_lm.py` on this machine,
with and without a monitor, one step of each in turn. The second compiles an update of
25 M parameters for TPU v5e and H100 and counts the whole arrays (weights, moments and
gradients) that its kernels read and write on every step, per weight: what runs within
the branch of the measured step is left out.
"""

import argparse
import os
import pathlib
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmp
from jaxmp.numerics import monitor
from jaxmp.report import compile_for

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import train_lm

EVERY, WARM_UP = 100, 10
LEAVES, SHAPE = 6, (2048, 2048)
TARGETS = ("tpu-v5e", "h100")


# Time on this machine


def make_run(watched):
    """Returns a state and a compiled step of the language model, and the batches."""
    text, _, vocabulary = train_lm.load_text(seed=0)
    model = jaxmp.apply_policy(train_lm.GPT(vocabulary), "mixed_float16")
    example = jnp.zeros((1, train_lm.CONTEXT), jnp.int32)
    clipped = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(train_lm.LEARNING_RATE)
    )
    tx = jaxmp.loss_scaling(clipped, "mixed_float16")
    state = jaxmp.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), example)["params"],
        tx=monitor(tx, every=EVERY) if watched else tx,
        policy="mixed_float16",
    )
    starts = np.random.default_rng(0).integers(len(text) - 65, size=(20, 16))
    batches = [train_lm.windows_at(text, rows) for rows in starts]
    began = time.perf_counter()
    lowered = jax.jit(train_lm.train_step, donate_argnums=0).lower(state, batches[0])
    step = lowered.compile()
    return state, step, batches, time.perf_counter() - began


def time_steps(steps):
    """Returns the seconds of every step, those of compiling, and the last states."""
    runs = {watched: make_run(watched) for watched in (False, True)}
    states = {watched: run[0] for watched, run in runs.items()}
    seconds = {watched: [] for watched in runs}
    for i in range(steps):
        for watched, (_, step, batches, _) in runs.items():
            began = time.perf_counter()
            states[watched], _ = step(states[watched], batches[i % len(batches)])
            jax.block_until_ready(states[watched])
            seconds[watched].append(time.perf_counter() - began)
    compiling = {watched: run[3] for watched, run in runs.items()}
    return {k: np.array(x) for k, x in seconds.items()}, compiling, states


def overhead(seconds):
    """The share that a monitor adds to a run, from the medians of its two steps."""
    numbers = np.arange(1, len(seconds[True]) + 1)
    is_measured = numbers % EVERY == 0
    is_counted = numbers > WARM_UP
    plain = np.median(seconds[False][is_counted])
    other = np.median(seconds[True][is_counted & ~is_measured])
    measured = np.median(seconds[True][is_measured])
    mean = ((EVERY - 1) * other + measured) / EVERY
    return plain, other, measured, mean / plain - 1


def print_times(steps):
    seconds, compiling, states = time_steps(steps)
    plain, other, measured, share = overhead(seconds)
    total = seconds[True][WARM_UP:].sum() / seconds[False][WARM_UP:].sum() - 1
    print(f"step without a monitor       {1e3 * plain:8.2f} ms")
    print(f"with it, not measured        {1e3 * other:8.2f} ms")
    print(f"with it, measured            {1e3 * measured:8.2f} ms")
    print(f"a run, every={EVERY}, by medians  {share:+8.2%}")
    print(f"a run, every={EVERY}, by sums     {total:+8.2%}")
    print(f"trace and compile, without   {compiling[False]:8.2f} s")
    print(f"trace and compile, with      {compiling[True]:8.2f} s")
    same = jax.tree.map(np.array_equal, states[False].params, states[True].params)
    print("same parameters, bit by bit  ", all(jax.tree.leaves(same)))


# Traffic on other machines


def cases():
    """Maps the name of an update to (the update, the update under a monitor)."""
    adamw = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    scaled = jaxmp.loss_scaling(clipped, "mixed_float16")
    return {
        f"{name}, {dtype} gradients": (tx, monitor(tx, every=EVERY), dtype)
        for name, tx in {"adamw": adamw, "loss_scaling(clip + adamw)": scaled}.items()
        for dtype in ("float32", "float16")
    }


def compile_update(tx, grads_dtype, target):
    """Compiles `(params, state, grads) -> (params, state)`, the first two donated."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def weights(dtype):
        return {f"w{i}": jax.ShapeDtypeStruct(SHAPE, dtype) for i in range(LEAVES)}

    params = weights(jnp.float32)
    state = jax.eval_shape(tx.init, params)
    return compile_for(
        target, step, params, state, weights(grads_dtype), donate_argnums=(0, 1)
    )


KERNELS = ("fusion", "copy", "select", "multiply", "add", "reduce", "convert")


def arrays_touched(hlo):
    """Whole arrays that kernels outside of every branch read or write, per weight."""
    whole = "[{},{}]".format(*SHAPE)
    types, count = {}, 0
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)", line)
        if match is None:
            continue
        name, type_, operation, operands = match.groups()
        types[name] = type_
        if operation in KERNELS:
            read = [types.get(o, "") for o in re.findall(r"%([\w.\-]+)", operands)]
            count += type_.count(whole) + sum(t.count(whole) for t in read)
    return count / LEAVES


def measure(name, target):
    """Arrays touched per weight and temporary bytes per parameter, without and with."""
    *txs, dtype = cases()[name]
    found = []
    for tx in txs:
        compiled = compile_update(tx, jnp.dtype(dtype), target)
        temp = compiled.memory_analysis().temp_size_in_bytes
        found.append(
            (arrays_touched(compiled.as_text()), temp / (LEAVES * np.prod(SHAPE)))
        )
    return found


def print_traffic():
    print("update                                         target   arrays        temp")
    for target in TARGETS:
        for name in cases():
            (arrays, temp), (watched_arrays, watched_temp) = measure(name, target)
            print(
                f"{name:46} {target:7} {arrays:4.1f} {watched_arrays:4.1f}  "
                f"{temp:6.3f} {watched_temp:6.3f}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=310)
    parser.add_argument("--traffic", action="store_true")
    args = parser.parse_args()
    print_traffic() if args.traffic else print_times(args.steps)


if __name__ == "__main__":
    main()
