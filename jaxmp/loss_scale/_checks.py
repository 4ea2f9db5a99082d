"""What `loss_scaling` checks before it starts, and whenever a step is traced."""

from typing import Any

import jax
import optax

from jaxmp import _tree, _warnings
from jaxmp._jaxpr.fp8_metadata import overwritten
from jaxmp._transformations import composition
from jaxmp.errors import (
    Fp8MetadataWarning,
    GradientTreeMismatch,
    HalfParamsWarning,
    TransformationOrder,
)

OVERWRITES = "overwrite_with_gradient"


def warn_about_half_params(params: Any) -> None:
    """Warns of half parameters, for an optimizer that keeps no float32 copy of them."""
    half = [
        _tree.path_string(path)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if _tree.is_array(x) and x.dtype in _tree.HALF
    ]
    if half:
        _warnings.warn(
            f"{len(half)} parameters are stored in half precision ({half[0]!r} is the "
            "first), and the optimizer keeps no float32 copy of them: an update below "
            "1/256 of a bfloat16 weight, or 1/2048 of a float16 one, is lost. Keep a "
            "copy with loss_scaling(master_weights(optimizer), policy), or store the "
            "parameters in float32, as 'mixed_bfloat16' and 'mixed_float16' do.",
            HalfParamsWarning,
        )


def warn_about_fp8_metadata(grads: Any, inner_state: Any) -> None:
    """Warns of FP8 metadata among gradients, if nothing inside overwrites with it."""
    if OVERWRITES in composition.names(inner_state):
        return
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    metadata = [
        _tree.path_string(path)
        for (path, _), is_metadata in zip(leaves, overwritten(grads), strict=True)
        if is_metadata
    ]
    if metadata:
        _warnings.warn(
            f"{len(metadata)} of the gradients are scales and histories of float8 "
            f"layers ({metadata[0]!r} is the first). What JAX returns for them is "
            "their new value, and the optimizer takes it for a gradient. Overwrite "
            "them with it: loss_scaling(overwrite_with_gradient(optimizer), policy).",
            Fp8MetadataWarning,
        )


def refuse_averaged_scales(inner_state: Any) -> None:
    """Raises if MultiSteps would average FP8 metadata before it is put in place."""

    def averages(x: Any) -> bool:
        return isinstance(x, optax.MultiStepsState)

    for node in jax.tree.leaves(inner_state, is_leaf=averages):
        if averages(node) and OVERWRITES in composition.names(node.inner_opt_state):
            raise TransformationOrder(
                f"{OVERWRITES}() stands inside optax.MultiSteps, which averages the "
                "scales of float8 layers over a window. Swap them: loss_scaling("
                f"{OVERWRITES}(optax.MultiSteps(optax.adamw(1e-3), 4)), policy)."
            )


def check_same_tree(grads: Any, params: Any) -> None:
    """Raises unless gradients and parameters have the same paths.

    A None on either side stands for a whole subtree.

    Raises:
      GradientTreeMismatch: naming the first path that one of them lacks.
    """
    if isinstance(params, optax.LookaheadParams):
        params = params.fast
    if params is None or jax.tree.structure(grads) == jax.tree.structure(params):
        return
    of_grads, of_params = _leaf_paths(grads), _leaf_paths(params)
    nones = [path for path, x in of_grads.items() if x is None]
    nones += [path for path, x in of_params.items() if x is None]

    def is_accounted_for(path: tuple[Any, ...]) -> bool:
        return any(path[: len(none)] == none for none in nones)

    for paths, others, first, second in (
        (of_grads, of_params, "gradient", "parameter"),
        (of_params, of_grads, "parameter", "gradient"),
    ):
        for path in paths:
            if path not in others and not is_accounted_for(path):
                raise GradientTreeMismatch(
                    f"There is a {first} {_tree.path_string(path)!r} but no {second} "
                    "of that name. Differentiate with respect to the same tree that "
                    "you pass as params and initialised the optimizer with."
                )


def _leaf_paths(tree: Any) -> dict[tuple[Any, ...], Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    return dict(leaves)
