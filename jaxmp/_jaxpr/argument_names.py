"""What the arguments of a call, and the leaves in them, are called."""

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxmp import _tree
from jaxmp._jaxpr.arguments import is_module


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
    is_leaf = None if nnx is None else functools.partial(is_module, nnx)
    leaves = jax.tree_util.tree_leaves_with_path((tuple(args), kwargs), is_leaf=is_leaf)
    for path, x in leaves:
        position = path[1].idx if path[0].idx == 0 else None
        root = str(path[1].key) if position is None else parameters[position]
        leaf = Leaf(root + jax.tree_util.keystr(path[2:]), x, position)
        is_graph = is_leaf is not None and is_leaf(x)
        (modules if is_graph else others).append(leaf)
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
