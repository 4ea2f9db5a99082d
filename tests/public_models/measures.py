"""Measures of a half-precision program: its matmuls, its sums, its gradients."""

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
from jax.interpreters import partial_eval

import jaxmp
from jaxmp import _tree
from jaxmp._jaxpr.flops import matmul_shape
from jaxmp._jaxpr.primitives import MATMULS

HALF = ("bfloat16", "float16")
POLICIES = tuple(f"mixed_{dtype}" for dtype in HALF)
# Compiling is most of the time, and most of that is LLVM's optimisation.
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# A sum of so many terms, each of them rounded, may be made in half.
FEW = 16


class Equation(NamedTuple):
    """An equation, how often it is run, and whether in the backward pass."""

    equation: Any
    times: int
    backward: bool


def equations(jaxpr: Any, times: int = 1, backward: bool = False) -> Iterator[Equation]:
    """All equations of a jaxpr, inner ones included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        is_backward = backward or "transpose(" in str(equation.source_info.name_stack)
        yield Equation(equation, times, is_backward)
        is_scan = equation.primitive.name == "scan"
        inner_times = times * (equation.params["length"] if is_scan else 1)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner, inner_times, is_backward)


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
    for equation, times, _ in equations(jaxpr):
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
    """The sums of more than a few terms that a program makes in half, by line.

    The gradient of a bias is none of them: one reduction, which XLA makes in float32.
    Of a sum in the forward pass the terms are rounded besides, and of a scatter every
    partial sum.
    """
    return [
        f"{equation.primitive.name} of {terms} terms at {line_of(equation)}"
        for equation, _, backward in equations(jaxpr)
        if (terms := _terms(equation)) > few
        and equation.outvars[0].aval.dtype.name in HALF
        and not (backward and equation.primitive.name == "reduce_sum")
    ]


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


def weights(shapes: Any, seed: int = 0) -> Any:
    """Random weights in the manner of an initialisation, none of them special.

    Args:
      shapes: a tree of arrays or of `jax.ShapeDtypeStruct`.
      seed: of the draw.

    Returns:
      Float32 arrays: scales and variances about 1, other vectors about 0, and matrices
      and kernels of variance 1 / fan_in. What is no float is zero, or a key.
    """
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        *above, name = ("", *_tree.path_string(path).removesuffix("/value").split("/"))
        draw = rng.standard_normal(leaf.shape)
        is_vector = len(leaf.shape) < 2
        if name in ("scale", "var", "weight_g") or (name == "weight" and is_vector):
            value = 1 + 0.1 * abs(draw)
        elif name.startswith("cached"):
            value = 0 * draw
        elif is_vector or name == "bias":
            value = 0.1 * draw
        elif name == "embedding":
            value = 0.3 * draw
        else:
            value = draw / np.prod(leaf.shape[:-1]) ** 0.5
        # T5 does not divide its attention by the root of d_kv.
        value = value / 4 if above[-1] == "q" else value
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


SHARES = {"autocast": 0.95, "apply_policy": 0.9}
COSINES = {
    ("autocast", "mixed_bfloat16"): 0.99,
    ("autocast", "mixed_float16"): 0.995,
    ("apply_policy", "mixed_bfloat16"): 0.99,
    ("apply_policy", "mixed_float16"): 0.99,
}


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

    def check(self, full: "Training", way: str, policy: str) -> None:
        """Fails unless it began as in float32, and goes on as a training should."""
        np.testing.assert_allclose(self.losses[0], full.losses[0], rtol=0.02)
        assert {x.dtype.name for x in self.losses} == {"float32"}
        assert cosine(self.grads, full.grads) >= COSINES[way, policy]
        assert types(self.grads) == types(full.grads)
        assert self.compilations == 1
        # The scale of float16 starts high, and may have to come down twice.
        skipped = len(self.losses) - self.applied
        assert skipped <= (2 if policy == "mixed_float16" else 0)
        assert self.losses[-1] < self.losses[0]
        assert types(self.after) == types(self.before)

    @property
    def applied(self) -> int:
        return int(jaxmp.loss_scale_metrics(self.after)["applied_steps"])


def train(
    loss_fn: Callable[[Any, Any], Any], variables: Any, policy: str, steps: int = 5
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


def trace(loss_fn: Callable[[Any, Any], Any], variables: Any) -> Any:
    """The program of a loss and its gradient, without what nothing depends on."""
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss_fn))(*variables).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


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
