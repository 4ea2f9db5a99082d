"""The arguments of a call: what is traced, what is static, and what each is called."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
                _open_scopes(modules)
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


def _open_scopes(modules: Sequence[Any]) -> None:
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
    is_leaf = None if nnx is None else functools.partial(_is_module, nnx)
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


def _is_module(nnx: Any, x: Any) -> bool:
    return isinstance(x, (nnx.Module, nnx.Rngs))


def _check_static(fn: Any, leaf: Any) -> None:
    linen = sys.modules.get("flax.linen")
    if linen is not None and isinstance(leaf, linen.Module) and leaf.scope is not None:
        raise AutocastError(
            f"{getattr(fn, '__name__', fn)!r} is a method of the linen module "
            f"{type(leaf).__name__}, or was given one that is bound. Put autocast "
            "around apply: autocast(module.apply)(variables, x)."
        )


def argument_names(fn: Any, count: int) -> list[str]:
    """The names under which positional arguments are passed.

    Args:
      fn: the function.
      count: how many positional arguments there are.

    Returns:
      Those of its parameters, `"xs[0]"` for what goes into `*xs`, and `"args[0]"`
      where its signature is not known.
    """
    names: list[str] = []
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    for parameter in parameters:
        if parameter.kind in (
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        ):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(count - len(names))]
    return (names + [f"args[{i}]" for i in range(len(names), count)])[:count]


class Leaf(NamedTuple):
    """A leaf of a call's arguments.

    Attributes:
      name: for people, such as `"params['w']"` or `"model.linear.kernel"`.
      value: the leaf.
      position: of its argument; None if that was passed by name.
      variable: the nnx Variable that holds it, or None.
    """

    name: str
    value: Any
    position: int | None
    variable: Any = None

    @property
    def is_module_state(self) -> bool:
        """Whether an nnx module keeps it, and not as a parameter."""
        nnx: Any = sys.modules.get("flax.nnx")
        return self.variable is not None and not isinstance(self.variable, nnx.Param)


def named_leaves(
    fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Leaf], list[str]]:
    """The leaves of a call's arguments, and the names of the nnx modules among them.

    Args:
      fn: the function that is called.
      args, kwargs: its arguments.

    Returns:
      The leaves in the order of `flatten_arguments`: the state of the modules first.
    """
    nnx: Any = sys.modules.get("flax.nnx")
    parameters = argument_names(fn, len(args))
    modules: list[Leaf] = []
    others: list[Leaf] = []
    is_leaf = None if nnx is None else functools.partial(_is_module, nnx)
    leaves = jax.tree_util.tree_leaves_with_path((tuple(args), kwargs), is_leaf=is_leaf)
    for path, x in leaves:
        position = path[1].idx if path[0].idx == 0 else None
        root = str(path[1].key) if position is None else parameters[position]
        leaf = Leaf(root + jax.tree_util.keystr(path[2:]), x, position)
        is_module = is_leaf is not None and is_leaf(x)
        (modules if is_module else others).append(leaf)
    state = _state_of(nnx, modules) if modules else ()
    return [*state, *others], [module.name for module in modules]


def _state_of(nnx: Any, modules: Sequence[Leaf]) -> Iterator[Leaf]:
    """What several modules share is named after the first of them."""
    _, state = nnx.split([module.value for module in modules])
    variables = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    for path, variable in variables:
        module = modules[path[0].key]
        start = f"{module.name}.{state_name(path[1:])}"
        for inner, x in jax.tree_util.tree_leaves_with_path(variable):
            name = start + jax.tree_util.keystr(inner[1:])
            yield Leaf(name, x, module.position, variable)


def without_variable(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key path without the last step, if that is into an nnx Variable."""
    is_inside = bool(path) and getattr(path[-1], "name", None) == "value"
    return path[:-1] if is_inside else path


def state_name(path: Any) -> str:
    """Writes the path of a variable in the state of an nnx module as attributes."""
    return _tree.path_string(path).removesuffix("/value").replace("/", ".")
