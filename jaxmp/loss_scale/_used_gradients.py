"""Which gradients an optimizer looks at: an overflow in any other costs no step.

A frozen part of a model (`optax.partition` with `set_to_zero`, `optax.freeze`,
`master_weights(trainable=...)`) has gradients that reach no parameter and no moment.
Where its state shows that something is masked, the inner update is traced once more and
followed backwards from everything that it returns. A gradient that a norm, a moment or
an update is computed from counts as used, whatever becomes of it later.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.transforms import MaskedState

from jaxmp import _tree
from jaxmp._jaxpr.versions import open_jaxpr

PyTree = Any


class UsedGradients:
    """Remembers for one transformation which of its gradients it looks at."""

    def __init__(self):
        self._known: dict[Any, list[int]] = {}

    def __call__(
        self, update: Callable[..., Any], grads: PyTree, *rest: PyTree
    ) -> list[Any]:
        """Lists the gradients that an update depends on; all, if nothing is masked.

        Args:
          update: of the inner transformation, a function of `(grads, *rest)`.
          grads: pytree of arrays.
          *rest: pytrees: state, parameters and the arguments by name.

        Returns:
          Leaves of `grads`.
        """
        leaves = jax.tree.leaves(grads)
        if not _masks(rest):
            return leaves
        key = jax.tree.structure((grads, rest)), tuple(map(_type, leaves))
        if key not in self._known:
            self._known[key] = _positions(update, grads, rest)
        return [leaves[i] for i in self._known[key]]


def _type(x: Any) -> Any:
    return (x.shape, x.dtype) if _tree.is_array(x) else type(x)


def _positions(update: Callable[..., Any], grads: PyTree, rest: Any) -> list[int]:
    leaves, structure = jax.tree.flatten(grads)
    arrays = [i for i, x in enumerate(leaves) if _tree.is_array(x)]

    def of_arrays(*values):
        given = dict(zip(arrays, values, strict=True))
        full = [given.get(i, x) for i, x in enumerate(leaves)]
        return update(jax.tree.unflatten(structure, full), *rest)

    try:
        jaxpr = open_jaxpr(jax.make_jaxpr(of_arrays)(*[leaves[i] for i in arrays]))
    except Exception:  # what cannot be traced apart is called next, and says so itself
        return list(range(len(leaves)))
    needed = _needed(jaxpr)
    pairs = zip(arrays, jaxpr.invars, strict=True)
    return [i for i, variable in pairs if variable in needed]


def _masks(state: PyTree) -> bool:
    kinds = (optax.MaskedNode, MaskedState)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return any(isinstance(x, kinds) for x in nodes)


def _needed(jaxpr: Any) -> set[Any]:
    """The variables that something returned, or done, is computed from."""
    needed = {x for x in jaxpr.outvars if not _is_literal(x)}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            needed.update(x for x in equation.invars if not _is_literal(x))
    return needed


def _is_literal(x: Any) -> bool:
    return hasattr(x, "val")
