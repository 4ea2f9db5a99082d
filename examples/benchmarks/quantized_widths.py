"""From which width float8 and int8 pay, by what XLA's TPU compilers estimate.

    pip install 'jaxmp[test,targets]'
    python examples/benchmarks/quantized_widths.py
    python examples/benchmarks/quantized_widths.py --target tpu7x --width 4096

A multilayer perceptron of three square layers and a head of 128, under `autocast`:
gradients of its weights and of its 8,192 inputs. Nothing runs. A program's cycles are
the sum over its operations, which overlap less on a machine, or more. The H100's
compiler estimates none.
"""

import argparse
import itertools
import re

import jax
import jax.numpy as jnp
from compiled_updates import prepare_to_compile

import jaxmp
from jaxmp.report import compile_for

POLICY_OF = {"tpu7x": "mixed_fp8", "tpu-v6e": "mixed_int8", "tpu-v5e": "mixed_int8"}
"""What each chip has units for."""
WIDTHS = (1024, 2048, 4096)
LAYERS, HEAD, ROWS = 3, 128, 8192


def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
    """The mean square of what the perceptron returns."""
    *hidden, head = weights
    for weight in hidden:
        x = jax.nn.relu(x @ weight)
    return jnp.square((x @ head).astype(jnp.float32)).mean()


def cycles(policy: str, target: str, width: int) -> int:
    """The estimated cycles of a forward and a backward pass."""
    widths = [width] * (LAYERS + 1) + [HEAD]
    shapes = itertools.pairwise(widths)
    weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    x = jax.ShapeDtypeStruct((ROWS, width), jnp.bfloat16)
    step = jax.value_and_grad(jaxmp.autocast(loss, policy), (0, 1))
    text = compile_for(target, step, weights, x).as_text()
    return sum(map(int, re.findall(r'"estimated_cycles":"?(\d+)', text)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(POLICY_OF))
    parser.add_argument("--width", action="append", type=int)
    arguments = parser.parse_args()
    prepare_to_compile()
    print("| chip | policy | width | cycles | over mixed_bfloat16 |")
    print("|---|---|---|---|---|")
    for target in arguments.target or POLICY_OF:
        for width in arguments.width or WIDTHS:
            policy = POLICY_OF[target]
            try:
                found = cycles(policy, target, width)
                ratio = found / cycles("mixed_bfloat16", target, width)
                figures = f"{found:,}", f"{ratio:.2f}"
            except jax.errors.JaxRuntimeError:  # libtpu cannot always print a program
                figures = "no text", ""
            cells = (target, policy, width, *figures)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
