"""Random programs, as strategies of Hypothesis, and what tests make of one."""

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
from hypothesis import strategies as st

from tests.support.programs.blocks import BLOCKS
from tests.support.programs.operations import MATMULS, OPERATIONS
from tests.support.programs.run import run_program
from tests.support.programs.sums import SUMS
from tests.support.programs.whole import WHOLE

HALF = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
LONG = sorted(name for name in SUMS if name.endswith("long"))
SHORT = sorted(set(SUMS) - set(LONG))

# An index counts from the end, where a program goes on.
INDEX = st.sampled_from([-1, -1, -1, -2, 0])


def _steps(blocks: Sequence[Any], min_size: int, max_size: int) -> Any:
    operation = st.tuples(st.sampled_from(sorted(OPERATIONS)), INDEX, INDEX)
    whole = st.tuples(st.sampled_from(sorted(WHOLE)), INDEX)
    matmul = st.tuples(st.sampled_from([*MATMULS, *["matmul"] * 9]), INDEX)
    step = st.one_of(operation, operation, matmul, matmul, whole, *blocks)
    return st.lists(step, min_size=min_size, max_size=max_size)


def _around(names: Sequence[str], inner: Any) -> Any:
    return st.tuples(st.sampled_from(names), INDEX, inner)


# Only the innermost loops are long ones: a long one in a long one takes too long.
_ANY = [*sorted(BLOCKS), *SHORT]
_FEW = _steps([], 1, 2)
_LEAVES = [_around(_ANY, _FEW), _around(LONG, _FEW)]
_INNER = _steps(_LEAVES, 1, 3)
_OUTER = _steps([*_LEAVES, *[_around(_ANY, _INNER)] * 3], 3, 6)

PROGRAMS = st.tuples(_OUTER, st.integers(0, 2))
"""A program, and the integer that its branches depend on."""


def examples(number: int, **strategies: Any) -> Callable[[Any], Any]:
    """Runs a test for so many examples, the same each time."""
    settings = hypothesis.settings(
        max_examples=number,
        derandomize=True,
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.data_too_large,
            hypothesis.HealthCheck.large_base_example,
        ],
    )
    return lambda test: settings(hypothesis.given(**strategies)(test))


def loss_of(steps: Sequence[Any], half: Any = None) -> Callable[..., Any]:
    """A loss of some values of a program, the last among them, and these values.

    Args:
      steps: the program.
      half: as of `run_program`.
    """

    def loss(w: jax.Array, x: jax.Array, n: Any) -> Any:
        pool = run_program(steps, w, x, n, half)
        outputs = [pool[-1], *pool[len(pool) // 2 : -1 : 2]]
        outputs = [y.astype(jnp.float32) for y in outputs]
        return sum(jnp.mean(jnp.sin(y)) for y in outputs), outputs

    return loss


def gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss, the values, and the gradients by weight and input."""
    return jax.value_and_grad(loss, (0, 1), has_aux=True)


def arguments(n: Any = 0, seed: int = 7) -> tuple[Any, Any, Any]:
    """A weight, an input, and the integer."""
    keys = jax.random.split(jax.random.key(seed))
    w = jax.random.normal(keys[0], (8, 8)) / 8**0.5
    return w, jax.random.normal(keys[1], (4, 8)), n
