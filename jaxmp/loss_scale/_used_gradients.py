"""Finds the gradients that an optimizer looks at: overflows in others cost no step.

The gradients of a frozen part of a model (`optax.partition` with `set_to_zero`,
`optax.freeze`, `master_weights(trainable=...)`) reach no parameter and no moment. If a
state shows that something is masked, the inner update is traced once more and followed
backwards from everything that it returns. A gradient counts as used if a norm, a moment
or an update is computed from it, whatever becomes of that later.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.transforms import MaskedState

from jaxmp import _tree
from jaxmp._jaxpr.atoms import variables
from jaxmp._jaxpr.fp8_metadata import overwritten
from jaxmp._jaxpr.types import Jaxpr, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp._tree import PyTree


class UsedGradients:
    """Remembers which gradients one transformation looks at."""

    def __init__(self) -> None:
        self._known: dict[Any, list[int]] = {}

    def __call__(
        self, update: Callable[..., Any], grads: PyTree, *rest: PyTree
    ) -> list[Any]:
        """Lists the gradients that an update depends on; all if nothing is masked.

        Args:
          update: function `(grads, *rest)` that runs the inner transformation.
          grads: pytree of arrays.
          *rest: pytrees: state, parameters and the arguments by name.

        Returns:
          Leaves of `grads`, FP8 metadata left out.
        """
        leaves = jax.tree.leaves(grads)
        gradients = [i for i, x in enumerate(overwritten(grads)) if not x]
        if not _masks(rest):
            return [leaves[i] for i in gradients]
        key = jax.tree.structure((grads, rest)), tuple(map(_type, leaves))
        if key not in self._known:
            self._known[key] = _positions(update, grads, rest)
        used = set(self._known[key])
        return [leaves[i] for i in gradients if i in used]


def _type(x: Any) -> Any:
    return (x.shape, x.dtype) if _tree.is_array(x) else type(x)


def _positions(update: Callable[..., Any], grads: PyTree, rest: Any) -> list[int]:
    leaves, structure = jax.tree.flatten(grads)
    arrays = [i for i, x in enumerate(leaves) if _tree.is_array(x)]

    def of_arrays(*values: jax.Array) -> Any:
        given = dict(zip(arrays, values, strict=True))
        full = [given.get(i, x) for i, x in enumerate(leaves)]
        return update(jax.tree.unflatten(structure, full), *rest)

    try:
        jaxpr = open_jaxpr(jax.make_jaxpr(of_arrays)(*[leaves[i] for i in arrays]))
    except Exception:  # an update that cannot be traced by itself raises when called
        return list(range(len(leaves)))
    needed = _needed(jaxpr)
    pairs = zip(arrays, jaxpr.invars, strict=True)
    return [i for i, variable in pairs if variable in needed]


def _masks(state: PyTree) -> bool:
    kinds = (optax.MaskedNode, MaskedState)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return any(isinstance(x, kinds) for x in nodes)


def _needed(jaxpr: Jaxpr) -> set[Var]:
    """The variables that the results and effects of a jaxpr are computed from."""
    needed = set(variables(jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(variables(eqn.invars))
    return needed
