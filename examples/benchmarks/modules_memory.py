"""What `apply_policy` costs against the same dtypes written into a model by hand.

GPT-2 small (batch 8 x 1024, AdamW) and ResNet-50 (batch 64, SGD with momentum) are
compiled by XLA's own H100 and TPU v5e compilers, which need neither machine:

    pip install 'jaxmp[targets]'
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python examples/benchmarks/modules_memory.py
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from models.gpt2 import GPT2
from models.resnet import ResNet

import jaxmp
from jaxmp.report import compile_for

GIB = 2.0**30


class Job(NamedTuple):
    """A model's training step: inputs and labels, and its optimizer."""

    model: type[nn.Module]
    inputs: jax.ShapeDtypeStruct
    labels: jax.ShapeDtypeStruct
    optimizer: optax.GradientTransformation


def jobs() -> dict[str, Job]:
    """The models that are compared, by name."""
    tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    images = jax.ShapeDtypeStruct((64, 224, 224, 3), jnp.float32)
    classes = jax.ShapeDtypeStruct((64,), jnp.int32)
    return {
        "GPT-2 small": Job(GPT2, tokens, tokens, optax.adamw(1e-4)),
        "ResNet-50": Job(ResNet, images, classes, optax.sgd(0.1, momentum=0.9)),
    }


def models(job: Job) -> dict[str, nn.Module]:
    """The same model without any dtype, by hand and under a policy."""
    return {
        "float32": job.model(),
        "bfloat16 by hand": job.model(dtype=jnp.bfloat16),
        "apply_policy": jaxmp.apply_policy(job.model(), "mixed_bfloat16"),
    }


def make_step(job: Job, model: nn.Module) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns one training step and abstract arguments; the first three are state."""
    variables = jax.eval_shape(model.init, jax.random.key(0), job.inputs)
    params = variables["params"]
    statistics = {name: x for name, x in variables.items() if name != "params"}
    opt_state = jax.eval_shape(job.optimizer.init, params)

    def step(params, statistics, opt_state, inputs, labels):
        def loss_fn(params):
            logits, new = model.apply(
                {"params": params, **statistics}, inputs, mutable=list(statistics)
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), labels
            )
            return losses.mean(), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state_ = job.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new, opt_state_, loss

    return step, (params, statistics, opt_state, job.inputs, job.labels)


def seconds_to_trace(job: Job, modules: dict[str, nn.Module]) -> dict[str, float]:
    """Seconds of CPU to trace and lower each model's step; best of 5, interleaved."""
    times: dict[str, list[float]] = {dtypes: [] for dtypes in modules}
    for _ in range(5):
        for dtypes, model in modules.items():
            step, args = make_step(job, model)
            start = time.process_time()
            jax.jit(step).lower(*args)
            times[dtypes].append(time.process_time() - start)
    return {dtypes: min(all_times) for dtypes, all_times in times.items()}


def measure(job: Job, model: nn.Module, target: str) -> tuple[float, float | None]:
    """Returns temporary memory and bytes accessed in GiB; an H100 tells no bytes."""
    step, args = make_step(job, model)
    compiled = compile_for(target, step, *args, donate_argnums=(0, 1, 2))
    costs = compiled.cost_analysis() or {}
    accessed = costs.get("bytes accessed")
    temp = compiled.memory_analysis().temp_size_in_bytes
    return temp / GIB, accessed and accessed / GIB


def main() -> None:
    """Prints one line for every model, target and way to write the dtypes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", help="default: h100 and tpu-v5e")
    parser.add_argument("--model", action="append", choices=list(jobs()))
    parser.add_argument("--trace", action="store_true", help="time tracing only")
    arguments = parser.parse_args()
    if arguments.trace:
        for name in arguments.model or jobs():
            job = jobs()[name]
            for dtypes, seconds in seconds_to_trace(job, models(job)).items():
                print(f"{name:12} {dtypes:17} {seconds:5.2f} s of CPU to trace")
        return
    print(
        f"{'model':12} {'target':8} {'dtypes':17} {'temp GiB':>9} {'accessed GiB':>13}"
    )
    for name in arguments.model or jobs():
        job = jobs()[name]
        for target in arguments.target or ("h100", "tpu-v5e"):
            for dtypes, model in models(job).items():
                temp, accessed = measure(job, model, target)
                shown = "" if accessed is None else f"{accessed:.2f}"
                row = f"{name:12} {target:8} {dtypes:17} {temp:9.3f} {shown:>13}"
                print(row, flush=True)


if __name__ == "__main__":
    main()
