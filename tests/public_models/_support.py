"""What a half-precision program is asked for: its matmuls, its sums, its gradients."""

import collections
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax._src import source_info_util

import jaxmp
from jaxmp._flops import MATMULS, matmul_shape

HALF = ("bfloat16", "float16")
POLICIES = tuple(f"mixed_{dtype}" for dtype in HALF)
# Compiling is most of the time, and most of that is LLVM's optimisation.
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# A sum of so many terms, each of them rounded, may be made in half.
FEW = 16


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """All equations of a jaxpr, inner ones included, and how often each is run."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation, times
        inner_times = times
        if equation.primitive.name == "scan":
            inner_times *= equation.params["length"]
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner, inner_times)


def line_of(equation: Any) -> str:
    """The user's file and line that an equation comes from."""
    frame = source_info_util.user_frame(equation.source_info.traceback)
    return f"{frame.file_name}:{frame.start_line}" if frame else "an unknown line"


class Matmuls(NamedTuple):
    """The arithmetic of a program's floating matmuls and convolutions.

    Attributes:
      half: operations of those whose operands are both in half.
      total: operations of all.
      others: those that are not in half, by line and dtypes.
    """

    half: int
    total: int
    others: collections.Counter[str]

    @property
    def share(self) -> float:
        return self.half / self.total


def matmuls(jaxpr: Any) -> Matmuls:
    """Counts the matmuls of a jaxpr, a loop's as often as they are run."""
    half = total = 0
    others = collections.Counter[str]()
    for equation, times in equations(jaxpr):
        if equation.primitive.name not in MATMULS:
            continue
        dtypes = [v.aval.dtype for v in equation.invars[:2]]
        if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
            continue
        flops = times * matmul_shape(equation).flops
        total += flops
        if all(dtype.name in HALF for dtype in dtypes):
            half += flops
        else:
            others[f"{line_of(equation)} of {' and '.join(map(str, dtypes))}"] += flops
    return Matmuls(half, total, others)


def sums_in_half(jaxpr: Any, few: int = FEW) -> list[str]:
    """The sums of more than a few terms that a program makes in half, by line."""
    return [
        f"{equation.primitive.name} of {terms} terms at {line_of(equation)}"
        for equation, _ in equations(jaxpr)
        if (terms := _terms(equation)) > few
        and equation.outvars[0].aval.dtype.name in HALF
        and not _accumulated_by_the_compiler(equation)
    ]


def _accumulated_by_the_compiler(equation: Any) -> bool:
    """Whether it is the gradient of a bias: one reduction, which XLA makes in float32.

    Of a forward sum the terms are rounded too, and of a scatter every partial sum.
    """
    backward = "transpose(" in str(equation.source_info.name_stack)
    return backward and equation.primitive.name == "reduce_sum"


def _terms(equation: Any) -> int:
    """How many numbers are added up to one, at most; 0 of what is no sum."""
    name, params = equation.primitive.name, equation.params
    shape = getattr(equation.invars[0].aval, "shape", ()) if equation.invars else ()
    if name in ("reduce_sum", "reduce_prod"):
        return math.prod(shape[axis] for axis in params["axes"])
    if name in ("cumsum", "cumprod", "cumlogsumexp"):
        return shape[params["axis"]]
    if name == "reduce_window_sum":
        return math.prod(params["window_dimensions"])
    if name in ("scatter-add", "scatter_add", "scatter-mul", "scatter_mul"):
        return math.prod(equation.invars[1].aval.shape[:-1])
    return 0


class Training(NamedTuple):
    """Some steps of a training on one batch.

    Attributes:
      losses: one of each step, before it.
      grads: true gradients of the first step that is not skipped; a skipped one
        leaves the parameters as they are.
      compilations: how often the step was compiled.
      before, after: the states of the training.
    """

    losses: list[Any]
    grads: Any
    compilations: int
    before: jaxmp.TrainState
    after: jaxmp.TrainState

    @property
    def applied(self) -> int:
        return int(jaxmp.loss_scale_metrics(self.after)["applied_steps"])


def train(
    loss_fn: Callable[[Any, Any], Any], variables: Any, policy: str, steps: int = 4
) -> Training:
    """Trains with `jaxmp.TrainState` and Adam.

    Args:
      loss_fn: function of parameters and of the other variables.
      variables: both of them, a pair.
      policy: of the state.
      steps: how many.

    Returns:
      What came of it.
    """
    params, others = variables

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def step(state: jaxmp.TrainState, others: Any) -> Any:
        loss, grads = state.value_and_grad(loss_fn)(state.params, others)
        return state.apply_gradients(grads=grads, value=loss), loss, grads

    before = state = jaxmp.TrainState.create(
        apply_fn=None, params=params, tx=optax.adam(1e-3), policy=policy
    )
    losses, first = [], {}
    for _ in range(steps):
        state, loss, grads = step(state, others)
        losses.append(loss)
        if not first and jaxmp.all_finite(grads):
            first = grads
    return Training(losses, first, step._cache_size(), before, state)


def types(tree: Any) -> dict[str, Any]:
    """Shape and dtype of every leaf, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): (x.shape, x.dtype) for p, x in leaves}


def cosine(a: Any, b: Any) -> float:
    """The cosine of the angle between two trees, each taken as one vector."""
    a, b = (np.concatenate([np.ravel(x) for x in _float64(t)]) for t in (a, b))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _float64(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
