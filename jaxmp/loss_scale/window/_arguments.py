"""The arguments of a loss function as a list of leaves, nnx models opened.

A model is split into its variables, so that weights which two layers share are one
leaf, and what a part of the batch changes in its copy of the model can be put back.
Flax is looked up among the imported modules: whoever passes a model has imported it.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp.errors import TransformError
from jaxmp.loss_scale.window._batch_arguments import Name


class _Model(NamedTuple):
    """An nnx model among the arguments, and where its leaves begin."""

    node: Any
    first: int
    graph: Any
    structure: Any


class Copy(NamedTuple):
    """Arguments with other leaves, and the models in them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    models: list[Any]


class Arguments:
    """Positional and keyword arguments, flattened.

    Attributes:
      leaves: arrays and whatever else the arguments hold, in a fixed order.
      paths: a key path for each; it begins with the argument's name.
      given: the arguments themselves, by position or keyword.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Flattens the arguments of a call."""
        nodes, self._structure = jax.tree_util.tree_flatten_with_path(
            (args, kwargs), is_leaf=_is_model
        )
        self.given: dict[Name, Any] = {**dict(enumerate(args)), **kwargs}
        self.leaves: list[Any] = []
        self.paths: list[Any] = []
        self._nodes: list[_Model | int] = []
        for path, node in nodes:
            if not _is_model(node):
                self._nodes.append(len(self.leaves))
                self.leaves.append(node)
                self.paths.append(path[1:])
                continue
            graph, state = _nnx().split(node)
            leaves, structure = jax.tree_util.tree_flatten_with_path(state)
            self._nodes.append(_Model(node, len(self.leaves), graph, structure))
            self.leaves += [leaf for _, leaf in leaves]
            self.paths += [(*path[1:], *inside) for inside, _ in leaves]

    def name(self, i: int) -> Name:
        """The position or keyword of the argument that a leaf belongs to."""
        key = self.paths[i][0]
        return getattr(key, "key", getattr(key, "idx", None))  # type: ignore[return-value]

    def with_leaves(self, leaves: Sequence[Any]) -> "Arguments":
        """The same arguments with other arrays."""
        other = copy.copy(self)
        other.leaves = list(leaves)
        return other

    def copy(self, leaves: Sequence[Any]) -> Copy:
        """The arguments with other leaves, in models of their own."""
        nodes, models = [], []
        for node in self._nodes:
            if isinstance(node, int):
                nodes.append(leaves[node])
                continue
            last = node.first + node.structure.num_leaves
            state = jax.tree.unflatten(node.structure, leaves[node.first : last])
            models.append(_nnx().merge(node.graph, state))
            nodes.append(models[-1])
        args, kwargs = jax.tree.unflatten(self._structure, nodes)
        return Copy(args, kwargs, models)

    def keys_of_models(self) -> Iterator[int]:
        """The leaves that are keys of the random streams in models."""
        for model in self._models():
            state = jax.tree.unflatten(model.structure, self._leaves_of(model))
            i = model.first
            for variable in jax.tree.leaves(state, is_leaf=_is_variable):
                if isinstance(variable, _nnx().RngKey):
                    yield i
                i += len(jax.tree.leaves(variable))

    def of_models(self) -> dict[int, Any]:
        """The leaves that are arrays in models."""
        return {
            i: self.leaves[i]
            for model in self._models()
            for i in range(model.first, model.first + model.structure.num_leaves)
            if isinstance(self.leaves[i], jax.Array)
        }

    def changes(self, made: Copy, given: Sequence[Any]) -> dict[int, Any]:
        """What a function changed in the models of a copy, by leaf.

        Args:
          made: the arguments that it was called with.
          given: the leaves that the copy was made of.

        Raises:
          TransformError: if a model has other variables than before.
        """
        changed = {}
        for model, copied in zip(self._models(), made.models, strict=True):
            state = _nnx().state(copied)
            leaves, structure = jax.tree.flatten(state)
            if structure != model.structure:
                raise TransformError(
                    f"The loss function gave an nnx {type(copied).__name__} other "
                    "variables than it had, and a part of a batch cannot add any. Call "
                    "the model once before the first step, so that it has them all."
                )
            for i, leaf in enumerate(leaves, model.first):
                if leaf is not given[i]:
                    changed[i] = leaf
        return changed

    def write(self, changed: Mapping[int, Any]) -> None:
        """Puts changed leaves into the models that were passed."""
        for model in self._models():
            span = range(model.first, model.first + model.structure.num_leaves)
            if not any(i in changed for i in span):
                continue
            leaves = [changed.get(i, self.leaves[i]) for i in span]
            _nnx().update(model.node, jax.tree.unflatten(model.structure, leaves))

    def _models(self) -> list[_Model]:
        return [node for node in self._nodes if isinstance(node, _Model)]

    def _leaves_of(self, model: _Model) -> list[Any]:
        return self.leaves[model.first : model.first + model.structure.num_leaves]


def mean_of_parts(x: jax.Array, before: Any) -> jax.Array:
    """What parts of a batch made of one leaf of a model, as one.

    Args:
      x: an axis of parts, then those of the leaf.
      before: the leaf that they all began with.

    Returns:
      The mean of a floating leaf, computed in float32 at least; else the last part's.
    """
    if not _tree.is_inexact(x):
        return x[-1]
    return _tree.at_least_float32(x).mean(0).astype(jnp.result_type(before))


def _nnx() -> Any:
    return sys.modules["flax.nnx"]


def _is_model(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Pytree)


def _is_variable(x: Any) -> bool:
    return isinstance(x, _nnx().Variable)
