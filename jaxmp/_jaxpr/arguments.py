"""The arguments of a call: what is traced, and what is static."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxmp import _tree
from jaxmp.errors import AutocastError


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands where an array was taken out of the arguments."""


_SLOT = _Slot()


class Arguments:
    """A call's arguments without their arrays.

    Attributes:
      tree: structure of `(args, kwargs)`, with nnx modules as leaves.
      statics: its leaves; arrays are replaced by a slot.
      graph: structure of the nnx modules among the leaves, or None.
      modules: these modules themselves.
      num_state: how many of the arrays are the modules' state.
    """

    def __init__(
        self,
        tree: Any,
        statics: Sequence[Any],
        graph: Any,
        modules: Sequence[Any],
        num_state: int,
    ):
        self.tree = tree
        self.statics = tuple(statics)
        self.graph = graph
        self.modules = modules
        self.num_state = num_state

    def trace(
        self, fn: Callable[..., Any], arrays: Sequence[Any], name_modules: bool = False
    ) -> tuple[Any, Any]:
        """Traces `fn` to a jaxpr of the arrays, and gives its output's structure.

        With `name_modules`, nnx modules open a name scope each, as linen modules do.
        """
        trees = []

        def flat(*arrays: Any) -> list[Any]:
            modules, state, rest = self.merge(arrays)
            if name_modules:
                open_scopes(modules)
            filled = iter(rest)
            merged = iter(modules)
            leaves = [
                next(filled)
                if leaf is _SLOT
                else next(merged)
                if leaf is _MODULE
                else leaf
                for leaf in self.statics
            ]
            args, kwargs = jax.tree.unflatten(self.tree, leaves)
            outputs = fn(*args, **kwargs), state()
            leaves, tree = jax.tree.flatten(outputs)
            trees.append(tree)
            return leaves

        return jax.make_jaxpr(flat)(*arrays), trees[0]

    def merge(
        self, arrays: Sequence[Any]
    ) -> tuple[list[Any], Callable[[], Any], Sequence[Any]]:
        """Rebuilds the nnx modules; returns them, how to read their state, the rest."""
        if self.graph is None:
            return [], lambda: None, arrays
        nnx = sys.modules["flax.nnx"]
        graphdef, state_tree = self.graph
        state = jax.tree.unflatten(state_tree, arrays[: self.num_state])
        modules = nnx.merge(graphdef, state)
        return modules, lambda: nnx.state(modules), arrays[self.num_state :]

    def finish(self, outputs: tuple[Any, Any]) -> Any:
        """Writes the new state into the modules and returns the function's output."""
        output, state = outputs
        if self.graph is not None:
            sys.modules["flax.nnx"].update(self.modules, state)
        return output


_MODULE = _Slot()


def open_scopes(modules: Sequence[Any]) -> None:
    """Makes each nnx module run under its path, relative to the argument it is in."""
    if not modules:
        return
    nnx = sys.modules["flax.nnx"]
    for root in modules:
        called = {p: m for p, m in nnx.iter_modules(root) if callable(m)}
        for path, module in called.items():
            parents = (path[:n] for n in range(len(path) - 1, -1, -1))
            parent = next((p for p in parents if p in called), ())
            name = "_".join(map(str, path[len(parent) :])) or type(module).__name__
            object.__setattr__(module, "__class__", _scoped(type(module), name))


@functools.lru_cache(maxsize=1024)
def _scoped(cls: type, name: str) -> type:
    """A class like `cls` that runs `__call__` under a name scope."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(name):
            return cls.__call__(self, *args, **kwargs)

    return type(cls)(cls.__name__, (cls,), {"__call__": call, "__doc__": cls.__doc__})


def flatten_arguments(
    fn: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Arguments, list[Any]]:
    """Splits a call's arguments into arrays and the rest."""
    nnx = sys.modules.get("flax.nnx")
    is_leaf = None if nnx is None else functools.partial(is_module, nnx)
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
    modules = [] if is_leaf is None else [x for x in leaves if is_leaf(x)]
    graph, state_leaves = None, []
    if nnx is not None and modules:
        graphdef, state = nnx.split(modules)
        state_leaves, state_tree = jax.tree.flatten(state)
        graph = graphdef, state_tree
    arrays, statics = [], []
    for leaf in leaves:
        if is_leaf is not None and is_leaf(leaf):
            statics.append(_MODULE)
        elif _tree.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            arrays.append(leaf)
            statics.append(_SLOT)
        else:
            _check_static(fn, leaf)
            statics.append(leaf)
    arguments = Arguments(tree, statics, graph, modules, len(state_leaves))
    return arguments, [*state_leaves, *arrays]


def is_module(nnx: Any, x: Any) -> bool:
    """Whether a leaf is an nnx module, or random streams of nnx."""
    return isinstance(x, (nnx.Module, nnx.Rngs))


def _check_static(fn: Any, leaf: Any) -> None:
    linen = sys.modules.get("flax.linen")
    if linen is not None and isinstance(leaf, linen.Module) and leaf.scope is not None:
        raise AutocastError(
            f"{getattr(fn, '__name__', fn)!r} is a method of the linen module "
            f"{type(leaf).__name__}, or was given one that is bound. Put autocast "
            "around apply: autocast(module.apply)(variables, x)."
        )
