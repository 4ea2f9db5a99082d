"""`master_weights`: half parameters in the model, float32 copies in the state.

    tx = loss_scaling(master_weights(optax.adamw(1e-3)), policy)

The inner optimizer sees float32 weights and float32 gradients, as if the model were
stored in float32. The resulting update moves the half weights exactly onto the rounded
master, so `optax.apply_updates`, `nnx.Optimizer` and `TrainState` work unchanged.

Sharp edges
- A weight that falls below 2^-16 of its size in one step (float16: below 2^-13) may
  miss the rounded master by the rounding of that step; the next step corrects it.
- A working weight that has become infinite, because its master left float16's range,
  stays infinite: no finite update leads back.
- With `split=True`, working weight and remainder form the master together, so loading
  or editing a weight changes the master too. Without it, the next step pulls an edited
  weight back to its master; use `load_master_weights` instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmp import _tree
from jaxmp._transformations import composition
from jaxmp._transformations.rounding import (
    join_float32,
    landing_update,
    round_to_nearest,
    split_float32,
)
from jaxmp._transformations.wrapping import (
    COPY_OR_RANDOM,
    LOSS_SCALING_OUTERMOST,
    float32_view,
    pinned,
    require_params,
    strong_state,
    with_extra_args,
)
from jaxmp._tree import PyTree
from jaxmp.errors import MasterWeightsMismatch, OptimizerOptionError

_REPAIRS = {
    "loss_scaling": LOSS_SCALING_OUTERMOST,
    "master_weights": "One float32 copy is enough: master_weights(optax.adamw(1e-3)).",
    "stochastic_rounding": COPY_OR_RANDOM,
}


class MasterWeightsState(NamedTuple):
    """State of `master_weights`."""

    inner_state: optax.OptState
    """State of the inner optimizer, as it is for float32 parameters."""
    master: PyTree
    """One float32 array per half parameter, or one uint16 array with `split=True`;
    `optax.MaskedNode` for every other parameter."""

    transformation = "master_weights"
    forwards_decision = True
    lands_on_half = True


def master_weights(
    inner: optax.GradientTransformation,
    *,
    split: bool = False,
    trainable: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps a float32 copy of half-precision parameters, and optimizes that.

    After `optax.apply_updates` the working weights equal `round(master)` on every step.
    Parameters of other dtypes have no copy and reach `inner` unchanged.

    Args:
      inner: any Optax transformation. It sees float32 parameters and gradients.
      split: True stores only the 16 bits that a bfloat16 weight lacks, in place of a
        float32 master: two bytes per parameter, and together exactly float32. Working
        weights are then rounded to nearest with ties away from zero, else to even.
      trainable: the parameters that move: booleans, as a pytree or a prefix of it, or a
        function from parameters to that. The others are frozen: they get no master and
        no state in `inner`, which sees `optax.MaskedNode` in their place.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `MasterWeightsState`,
      and whose updates are float32. `update` needs the parameters.

    Raises:
      OptimizerOptionError: from `init`, if `split` meets float16 parameters.
      TransformationOrder: from `init`, if `inner` contains a loss scale, stochastic
        rounding or another master.
      MissingParams: from `update` without parameters.
      MasterWeightsMismatch: from `update`, if the parameters have other dtypes than
        `init` saw.

    References:
      Micikevicius et al., "Mixed Precision Training", 2018, section 3.1
      (https://arxiv.org/abs/1710.03740). The split form follows Megatron-LM's
      `store_param_remainders` (megatron/core/optimizer/optimizer_config.py).

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
      >>> tx = jaxmp.master_weights(optax.sgd(1e-3))
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     updates, state = tx.update({"w": jnp.ones(2)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params["w"], state.master["w"])
      [0.988281 0.988281] [0.9900001 0.9900001]
    """
    inner = with_extra_args(inner)

    def init_fn(params: optax.Params) -> MasterWeightsState:
        moving = _hide_frozen(params, trainable)
        inner_state = strong_state(inner.init(float32_view(moving)))
        composition.refuse_inside("master_weights", inner_state, _REPAIRS)
        master = jax.tree_util.tree_map_with_path(
            lambda path, p: _first_master(path, p, split), moving
        )
        return MasterWeightsState(inner_state, master)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MasterWeightsState]:
        composition.require_state(state, MasterWeightsState, "master_weights")
        require_params(params, "master_weights")
        moving = _hide_frozen(params, trainable)
        weights = jax.tree_util.tree_map_with_path(_weight, moving, state.master)
        updates, inner_state = inner.update(
            float32_view(_hide_frozen(updates, trainable)),
            state.inner_state,
            weights,
            **extra_args,
        )
        moves = jax.tree.map(_move, moving, state.master, weights, updates)
        updates = jax.tree.map(lambda move: move.update, moves, is_leaf=_is_move)
        master = jax.tree.map(lambda move: move.master, moves, is_leaf=_is_move)
        return (
            jax.tree.map(_stand_still_if_frozen, params, updates),
            MasterWeightsState(pinned(inner_state, state.inner_state), master),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def round_to_working(weight: jax.Array, master: Any, p: Any) -> tuple[Any, Any]:
    """Rounds a float32 weight to the dtype of `p`, and makes its master anew.

    Args:
      weight: float32 array.
      master: the old master, which shows whether it is split.
      p: half-precision array.

    Returns:
      The rounded weight, as float32, and the new master.
    """
    if master.dtype == jnp.uint16:
        return split_float32(weight)
    return round_to_nearest(weight, p.dtype), weight


def weight_of(master: Any, p: Any) -> Any:
    """Returns the float32 weight whose working copy is `p`."""
    if is_masked(master):
        return p
    return join_float32(p, master) if master.dtype == jnp.uint16 else master


def is_masked(x: Any) -> bool:
    """Whether this stands for a parameter without a master."""
    return isinstance(x, optax.MaskedNode)


class _Move(NamedTuple):
    update: Any
    master: Any


def _is_move(x: Any) -> bool:
    return isinstance(x, _Move)


def _move(p: Any, master: Any, weight: Any, update: Any) -> _Move:
    if is_masked(master):
        return _Move(update, master)
    target, master = round_to_working(weight + update, master, p)
    return _Move(landing_update(target, p), master)


def _first_master(path: Any, p: Any, split: bool) -> Any:
    if not (_tree.is_array(p) and p.dtype in _tree.HALF):
        return optax.MaskedNode()
    if not split:
        return jnp.asarray(p, jnp.float32)
    if p.dtype != jnp.bfloat16:
        raise OptimizerOptionError(
            f"split=True with the {p.dtype} parameter {_tree.path_string(path)!r}: "
            "only bfloat16 is the upper half of float32. Leave split out, or "
            "store the parameters in bfloat16."
        )
    return jnp.zeros_like(p, jnp.uint16)


def _weight(path: Any, p: Any, master: Any) -> Any:
    is_half = _tree.is_array(p) and p.dtype in _tree.HALF
    if is_half == is_masked(master):
        master_is = "no float32 master" if is_half else "a float32 master"
        raise MasterWeightsMismatch(
            f"The parameter {_tree.path_string(path)!r} is {p.dtype}, and it has "
            f"{master_is}: init() saw another dtype than update() does. Call "
            "tx.init on the half-precision parameters; load_master_weights(state, "
            "params, weights) then gives them their float32 values."
        )
    return weight_of(master, p)


def _hide_frozen(tree: PyTree, trainable: Any) -> PyTree:
    """Replaces every leaf that does not move by a MaskedNode, as optax.masked does."""
    no_leaves = not jax.tree.leaves(tree)  # as in optax.tree_map_params
    if trainable is None or no_leaves:
        return tree
    moves = trainable(tree) if callable(trainable) else trainable

    def hide(moves: Any, subtree: PyTree) -> PyTree:
        if moves:
            return subtree
        return jax.tree.map(lambda _: optax.MaskedNode(), subtree)

    return jax.tree.map(hide, moves, tree)


def _stand_still_if_frozen(p: Any, update: Any) -> Any:
    return _tree.negative_zero(p) if is_masked(update) else update
