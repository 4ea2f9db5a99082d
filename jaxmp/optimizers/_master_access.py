"""Reading, loading and checking master weights from outside the optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import _tree
from jaxmp._transformations import composition
from jaxmp._tree import PyTree
from jaxmp.errors import MasterWeightsMismatch, MissingState
from jaxmp.optimizers._copies import Weights, replace_copies
from jaxmp.optimizers._master_weights import (
    MasterWeightsState,
    is_masked,
    round_to_working,
    weight_of,
)


def get_master_weights(opt_state: optax.OptState, params: PyTree) -> PyTree:
    """Returns the float32 weights, for evaluation or for a float32 checkpoint.

    Args:
      opt_state: state of `master_weights`, or anything that contains it.
      params: the working parameters.

    Returns:
      `params` with the float32 master in place of every half leaf that has one.

    Raises:
      MissingState: if `opt_state` holds no master weights.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.optimizers import get_master_weights
      >>> w = jnp.ones((), jnp.bfloat16)
      >>> tx = jaxmp.master_weights(optax.sgd(1e-3), split=True)
      >>> updates, state = tx.update(jnp.float32(1), tx.init(w), w)
      >>> w = optax.apply_updates(w, updates)
      >>> print(w, get_master_weights(state, w))
      1 0.999
    """
    for node in _states(opt_state):
        params = jax.tree.map(weight_of, node.master, params, is_leaf=is_masked)
    return params


def load_master_weights(
    opt_state: optax.OptState, params: PyTree, weights: PyTree
) -> tuple[PyTree, optax.OptState]:
    """Loads float32 weights into the masters, and their rounding into the parameters.

    Use it to start half-precision training from float32 parameters without losing their
    low bits, or to continue from a float32 checkpoint.

    Args:
      opt_state: state of `master_weights`, or anything that contains it.
      params: the working parameters, in the dtypes that they are trained in.
      weights: tree of the same structure and shapes, in float32.

    Returns:
      The new parameters and the new state; moments and counts are unchanged.

    Raises:
      MissingState: if `opt_state` holds no master weights.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.optimizers import load_master_weights
      >>> weights = jnp.float32(0.1)
      >>> params = weights.astype(jnp.bfloat16)
      >>> tx = jaxmp.master_weights(optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> params, state = load_master_weights(state, params, weights)
      >>> print(params, state.master)
      0.100098 0.1
    """
    _states(opt_state)
    working = jax.tree.map(_tree.like, weights, params)

    def round_weight(master: Any, weight: Any, p: Any) -> Any:
        if is_masked(master):
            return p
        return round_to_working(_float32(weight), master, p)[0].astype(p.dtype)

    def new_master(master: Any, weight: Any, p: Any) -> Any:
        if is_masked(master):
            return master
        return round_to_working(_float32(weight), master, p)[1]

    def load(node: Any) -> Any:
        nonlocal working
        if not isinstance(node, MasterWeightsState):
            return node
        trees = (node.master, weights, working)
        old = jax.tree.map(weight_of, node.master, params, is_leaf=is_masked)
        working = jax.tree.map(round_weight, *trees, is_leaf=is_masked)
        master = jax.tree.map(new_master, *trees, is_leaf=is_masked)
        new = jax.tree.map(weight_of, master, working, is_leaf=is_masked)
        inner_state = replace_copies(node.inner_state, Weights(old, new))
        return node._replace(inner_state=inner_state, master=master)

    def is_ours(x: Any) -> bool:
        return isinstance(x, MasterWeightsState)

    opt_state = jax.tree.map(load, opt_state, is_leaf=is_ours)
    # States beside the masters copy the working weights, some of them in float32.
    nodes, structure = jax.tree.flatten(opt_state, is_leaf=is_ours)
    beside = [None if is_ours(x) else x for x in nodes]
    beside = jax.tree.unflatten(structure, beside)
    for cast in (lambda x: x, _tree.at_least_float32):
        views = (jax.tree.map(cast, tree) for tree in (params, working))
        beside = replace_copies(beside, Weights(*views))
    rest = jax.tree.leaves(beside, is_leaf=lambda x: x is None)
    nodes = [y if x is None else x for x, y in zip(rest, nodes, strict=True)]
    return working, jax.tree.unflatten(structure, nodes)


def check_master_weights(opt_state: optax.OptState, params: PyTree) -> None:
    """Raises on the host if working weights are not the rounded masters.

    Call it after a restore: parameters and optimizer state of different steps go on
    training silently, and the next update pulls the weights back to the masters. A
    split master cannot disagree, since the working weight is a part of it.

    Args:
      opt_state: state of `master_weights`, or anything that contains it.
      params: the working parameters.

    Raises:
      MissingState: if `opt_state` holds no master weights.
      MasterWeightsMismatch: naming the leaf, if a weight differs from its master by
        more than one unit in its last place and more than 2^-23 of the leaf's largest
        weight. A weight that shrank in one step may be off by that much.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.optimizers import check_master_weights
      >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
      >>> state = jaxmp.master_weights(optax.adamw(1e-3)).init(params)
      >>> check_master_weights(state, params)
      >>> check_master_weights(state, {"w": params["w"] * 2})
      Traceback (most recent call last):
      ...
      jaxmp.errors.MasterWeightsMismatch: 2 of 2 weights of 'w' are not ...
    """
    for node in _states(opt_state):
        jax.tree_util.tree_map_with_path(
            _check_leaf, node.master, params, is_leaf=is_masked
        )


def _states(opt_state: Any) -> list[MasterWeightsState]:
    states = [
        node
        for node in composition.nodes(opt_state)
        if isinstance(node, MasterWeightsState)
    ]
    if not states:
        raise MissingState(
            f"There are no master weights in this {type(opt_state).__name__}. Pass the "
            "state of an optimizer made with jaxmp.master_weights(optimizer)."
        )
    return states


def _float32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _check_leaf(path: Any, master: Any, p: Any) -> None:
    if is_masked(master) or master.dtype == jnp.uint16:
        return
    name = _tree.path_string(path)
    if p.shape != master.shape or p.dtype not in _tree.HALF:
        raise MasterWeightsMismatch(
            f"The working weights {name!r} are {p.dtype}{list(p.shape)}, and their "
            f"float32 master has the shape {list(master.shape)}. Restore parameters "
            "and optimizer state of one model, in one dtype."
        )
    working = np.asarray(p, np.float64)
    weights = np.asarray(master, np.float64)
    info = jnp.finfo(p.dtype)
    exponents = np.frexp(np.maximum(np.abs(weights), float(info.tiny)))[1]
    last_place = np.ldexp(1.0, exponents - 1 - info.nmant)
    largest = np.max(np.abs(weights), initial=0.0)
    agree = np.abs(working - weights) <= np.maximum(last_place, largest * 2.0**-23)
    beyond = np.abs(weights) > float(info.max)
    agree |= (beyond & (np.abs(working) >= float(info.max))) | (working == weights)
    if not agree.all():
        worst = np.unravel_index(np.argmin(agree), agree.shape)
        raise MasterWeightsMismatch(
            f"{np.sum(~agree)} of {agree.size} weights of {name!r} are not their "
            f"float32 masters rounded to {p.dtype}: {working[worst]:g} against "
            f"{weights[worst]:g} at {list(map(int, worst))}. Restore both from one "
            "checkpoint; load_master_weights(state, params, weights) sets both."
        )
