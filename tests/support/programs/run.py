"""Programs made of steps, for random ones to be put together.

A program is a list of steps over a pool of values. A step is an operation
`(name, i, j)` of two values, a matmul `(name, i)` with the weight, an operation
`(name, i)` that autocast binds whole, or a block `(name, i, steps)`: a call, loop or
branch around a smaller program. Everything is well-conditioned, so a rounding stays
one.

The same program can be run as one would write it in half by hand: its error is what
half precision costs, whatever the program is.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tests.support.programs.blocks import BLOCKS, DECIDED, Smaller
from tests.support.programs.operations import IN_FLOAT32, MATMULS, OPERATIONS
from tests.support.programs.sums import SUMS
from tests.support.programs.values import fit
from tests.support.programs.whole import FLOAT64, WHOLE, moved

UNARY = {**WHOLE, **FLOAT64, "moved": moved}


def run_program(
    steps: Sequence[Any], w: jax.Array, x: jax.Array, n: Any, half: Any = None
) -> list[jax.Array]:
    """Runs a program.

    Args:
      steps: the program.
      w: the weight, float32 `(8, 8)`.
      x: the input, float32 of any shape.
      n: an integer, which branches depend on.
      half: None runs it in float32, as it stands, for autocast to change. A half dtype
        runs it as written by hand: activations in half, weights cast where a matmul
        reads them; sums, norms, softmaxes and exponentials in float32, rounded when
        they are done; what a loop adds up is carried in float32.

    Returns:
      The pool of values, the input first.
    """
    pool = [_in(half, x)]
    for step in steps:
        pool.append(run_step(step, pool, w, n, half))
    return pool


def run_step(
    step: Any, pool: Sequence[jax.Array], w: jax.Array, n: Any, half: Any = None
) -> jax.Array:
    """Runs the next step of a program, over the pool of values so far."""
    name, i = step[:2]
    x = pool[i % len(pool)]
    if name in IN_FLOAT32 or name in UNARY or name in DECIDED:
        x = x if half is None else x.astype(jnp.float32)
    if name in OPERATIONS:
        y = fit(pool[step[2] % len(pool)], x).astype(x.dtype)
        y = OPERATIONS[name](x, y)
    elif name in MATMULS:
        y = MATMULS[name](_in(_matmul_dtype(name, half), w), x)
    elif name in UNARY:
        y = UNARY[name](x)
    elif name in SUMS:
        y = SUMS[name](_last_of(step[2], half), half, w, x, n)
    else:
        inner = None if name in DECIDED else half
        y = BLOCKS[name](_last_of(step[2], inner), w, x, n)
    return _in(half, y)


def _matmul_dtype(name: str, half: Any) -> Any:
    """What one casts the weight to by hand: to what the other operand is cast to."""
    if half is None or name in IN_FLOAT32:
        return None
    return jnp.bfloat16 if name == "promoted_matmul" else half


def _last_of(steps: Sequence[Any], half: Any) -> Smaller:
    """A program as a function of its input that returns its last value."""
    return lambda w, x, n: run_program(steps, w, x, n, half)[-1]


def _in(dtype: Any, x: jax.Array) -> jax.Array:
    return x if dtype is None else x.astype(dtype)
