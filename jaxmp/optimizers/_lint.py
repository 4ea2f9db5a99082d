"""`lint_optimizer`: numbers that an optimizer loses in the dtypes that it meets.

The update is traced twice, in the dtypes of the parameters and in float32. What is 1e-8
in one trace and 0 in the other was lost; which line wrote it, the trace remembers.
Nothing is compiled, but for one step with zero gradients, which shows whether weights
still decay.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import _tree
from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.sources import written
from jaxmp._jaxpr.types import Eqn
from jaxmp._jaxpr.walk import walk
from jaxmp._transformations import composition as _composition
from jaxmp._transformations.rounding import round_to_nearest
from jaxmp._transformations.wrapping import strong_state, with_extra_args
from jaxmp.optimizers._replacement import is_replacement
from jaxmp.optimizers._state_dtype import CastStateState

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that an optimizer loses in half precision.

    Attributes:
      kind: `"literal"`, `"hyperparameter"`, `"weights"`, `"moments"` or `"decay"`.
      message: what is lost, and what to do.
      source: file and line that wrote a literal, or the path of a leaf.
    """

    kind: str
    message: str
    source: str

    def __str__(self) -> str:
        return f"{self.source}: {self.message}"


def lint_optimizer(
    tx: optax.GradientTransformation, params: PyTree, **extra_args: Any
) -> list[Finding]:
    """Lists what an optimizer would lose in the dtypes of these parameters.

    Args:
      tx: any Optax transformation.
      params: pytree of arrays or `jax.ShapeDtypeStruct`s, in the dtypes that they are
        trained in. Only shapes and dtypes are used.
      **extra_args: what `tx.update` needs besides gradients, state and parameters.

    Returns:
      A list of `Finding`s: literals that become 0 or 1 (`eps`, `b2`, `1 - lr * decay`),
      injected hyperparameters that do so by name, a weight decay that moves nothing,
      half weights whose small updates are lost, and half moments that are rounded to
      nearest. An empty list means that nothing of this kind was found.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.optimizers import lint_optimizer
      >>> params = jnp.ones(8, jnp.bfloat16)
      >>> sorted({finding.kind for finding in lint_optimizer(optax.adam(1e-3), params)})
      ['literal', 'moments', 'weights']
      >>> lint_optimizer(jaxmp.master_weights(optax.adam(1e-3)), params)
      []
    """
    tx = with_extra_args(tx)
    params = jax.tree.map(_shape, params)
    state = jax.eval_shape(lambda p: strong_state(tx.init(p)), params)
    return [
        *_lost_weights(params, state),
        *_coarse_moments(params, state),
        *_lost_hyperparameters(tx, params),
        *_lost_literals(tx, params, extra_args),
        *_lost_decay(tx, params, state, extra_args),
    ]


def _lost_weights(params: PyTree, state: PyTree) -> Iterator[Finding]:
    half = [path for path, x in _leaves(params) if x.dtype in _tree.HALF]
    if half and not _composition.lands_on_half(state):
        yield Finding(
            "weights",
            f"{len(half)} parameters are in half precision without a float32 copy, and "
            "updates below 1/256 (bfloat16) or 1/2048 (float16) of a weight are lost. "
            "Use master_weights or stochastic_rounding.",
            half[0],
        )


def _coarse_moments(params: PyTree, state: PyTree) -> Iterator[Finding]:
    rounded_at_random = [
        id(x)
        for node in _composition.nodes(state)
        if isinstance(node, CastStateState) and node.draws is not None
        for x in jax.tree.leaves(node.inner_state)
    ]
    for path, x in _leaves(state):
        is_half = x.dtype in _tree.HALF and x.ndim > 0
        if is_half and id(x) not in rounded_at_random:
            yield Finding(
                "moments",
                f"stored in {x.dtype} and rounded to nearest: an average that moves by "
                "less than half a unit in its last place stands still. Use "
                "cast_state(..., rounding='stochastic').",
                path,
            )
        elif is_half and x.dtype == jnp.float16:
            yield Finding(
                "moments",
                "stored in float16: squares of gradients below 2e-4 become zero. Use "
                "bfloat16.",
                path,
            )


def _lost_hyperparameters(tx: Any, params: PyTree) -> Iterator[Finding]:
    def hyperparameters(params):
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params)
        found = {}
        for node in _injected(tx.init(ones)):
            found.update(node.hyperparams)
        return found

    wanted = hyperparameters(_in_float32(params))
    for name, x in hyperparameters(params).items():
        if _is_lost(x, wanted[name]):
            yield Finding(
                "hyperparameter",
                f"{float(wanted[name]):g} becomes {float(x):g} in {x.dtype}. Put the "
                "optimizer inside master_weights, which shows it float32.",
                name,
            )


def _injected(state: Any) -> Iterator[Any]:
    def is_injected(x):
        return isinstance(getattr(x, "hyperparams", None), dict)

    for node in jax.tree.leaves(state, is_leaf=is_injected):
        if is_injected(node):
            yield node
            yield from _injected(node.inner_state)


def _lost_literals(tx: Any, params: PyTree, extra_args: Any) -> Iterator[Finding]:
    wanted = _literals(tx, _in_float32(params), extra_args)
    for place, found in _literals(tx, params, extra_args).items():
        pairs = zip(found, wanted.get(place, []), strict=False)
        lost = {(float(y), float(x), x.dtype.name) for x, y in pairs if _is_lost(x, y)}
        for before, after, dtype in sorted(lost):
            yield Finding(
                "literal",
                f"{before:g} becomes {after:g} in {dtype}, in {place[1]!r}. Put the "
                "optimizer inside master_weights, which shows it float32.",
                place[0],
            )


def _lost_decay(
    tx: Any, params: PyTree, state: PyTree, extra_args: Any
) -> Iterator[Finding]:
    if _composition.lands_on_half(state):
        return

    def step(params):
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params)
        zeros = jax.tree.map(jnp.zeros_like, ones)
        return tx.update(zeros, tx.init(ones), ones, **extra_args)[0]

    updates = jax.tree.leaves(step(_in_float32(params)), is_leaf=is_replacement)
    for (path, p), update in zip(_leaves(params), updates, strict=False):
        if p.dtype not in _tree.HALF or is_replacement(update) or not jnp.any(update):
            continue
        largest = jnp.max(jnp.abs(update.astype(jnp.float32)))
        if round_to_nearest(1 - largest, p.dtype) == 1:
            yield Finding(
                "decay",
                f"with zero gradients a weight of 1 moves by {largest:.1g} a step "
                f"(learning rate times weight decay), which {p.dtype} loses. Use "
                "master_weights or stochastic_rounding.",
                path,
            )


def _literals(
    tx: Any, params: PyTree, extra_args: Any
) -> dict[tuple[str, str], list[np.ndarray]]:
    """Lists the scalar floating literals of an update by place and operation."""

    def update(params):
        return tx.update(params, tx.init(params), params, **extra_args)

    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for equation in walk(jax.make_jaxpr(update)(params)):
        for value in (atom.val for atom in equation.invars if is_literal(atom)):
            if _tree.is_inexact(value) and np.ndim(value) == 0:
                place = _source(equation), equation.primitive.name
                found.setdefault(place, []).append(np.asarray(value))
    return found


def _source(equation: Eqn) -> str:
    """The innermost line outside JAX."""
    nearest = written(equation.source_info.traceback).nearest
    return "unknown" if nearest is None else f"{nearest.file}:{nearest.line}"


def _is_lost(x: Any, wanted: Any) -> bool:
    return bool(jnp.any(x != wanted)) and float(x) in (0.0, 1.0)


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(_tree.path_string(path), x) for path, x in leaves]


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _in_float32(params: PyTree) -> PyTree:
    return _tree.cast_floating(params, jnp.float32)
