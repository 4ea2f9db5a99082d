"""Runs an nnx method in a region.

The modules among its arguments are split, and merged again inside: the method is traced
on copies, whose variables hold tracers. What it changes is then written to the modules
outside: variables with another value, new ones as `sow` makes them, and plain
attributes. A variable that it only reads is left alone, so that a module from outside a
`vmap` or a gradient can be called inside.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmp.casting.local import run_region
from jaxmp.casting.plan.plan import Settings


class ReturnsModule(Exception):
    """A method returned a module, whose copy would be useless outside."""


def run_method(
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
    named_scopes: bool,
    watch: Callable[[Any], None] | None,
    around_rules: Callable[[], Any],
) -> Any:
    """Calls a method in a region.

    Args:
      method: a function of the arguments; the first is the module itself.
      args, kwargs: pytrees of arrays, modules and anything else.
      settings, named_scopes, watch, around_rules: as for `run_region`.

    Returns:
      The result of the method.

    Raises:
      ReturnsModule: if the result contains modules; nothing has been written then.
    """
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    nodes = [x for x in leaves if _is_node(x)]
    graphdef, state = nnx.split(nodes)
    others = [None if _is_node(x) else x for x in leaves]
    attributes: dict[Any, Any] = {}

    def run(state: Any, others: Any) -> tuple[Any, ...]:
        copies = nnx.merge(graphdef, state)
        before = _values(copies)
        remaining = iter(copies)
        filled = [
            next(remaining) if _is_node(x) else other
            for x, other in zip(leaves, others, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(tree, filled)
        output = method(*args, **kwargs)
        if any(map(_is_node, jax.tree.leaves(output, is_leaf=_is_node))):
            raise ReturnsModule
        attributes.update(_changed_attributes(nodes, copies))
        variables = dict(nnx.to_flat_state(nnx.state(copies)))
        written = {
            path: variable
            for path, variable in variables.items()
            if before.get(path) is not _raw(variable)
        }
        return output, list(written.values()), tuple(written)

    output, values, paths = run_region(
        run, (state, others), settings, named_scopes, watch, around_rules
    )
    _write_attributes(nodes, attributes)
    if paths:
        nnx.update(nodes, nnx.from_flat_state(list(zip(paths, values, strict=True))))
    return output


def _is_node(x: Any) -> bool:
    return isinstance(x, (nnx.Module, nnx.Rngs, nnx.Variable))


def _values(nodes: Sequence[Any]) -> dict[Any, Any]:
    flat = nnx.to_flat_state(nnx.state(nodes))
    return {path: _raw(variable) for path, variable in flat}


def _raw(value: Any) -> Any:
    """The array in a variable; a layer may also hold a bare one."""
    return value.get_raw_value() if isinstance(value, nnx.Variable) else value


def _plain(module: nnx.Module) -> dict[str, Any]:
    """The attributes without variables, modules and arrays."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not any(
            isinstance(x, (jax.Array, np.ndarray)) or _is_node(x)
            for x in jax.tree.leaves(value, is_leaf=_is_node)
        )
    }


def _changed_attributes(
    nodes: Sequence[Any], copies: Sequence[Any]
) -> dict[tuple[Any, ...], Any]:
    """The attributes that a method set in the copies: `(node, path, name) -> value`."""
    changed = {}
    for i, (node, copied) in enumerate(zip(nodes, copies, strict=True)):
        originals = dict(nnx.iter_modules(node))
        for path, module in nnx.iter_modules(copied):
            if path not in originals:
                continue
            before = _plain(originals[path])
            for name, value in _plain(module).items():
                if name not in before or _differs(before[name], value):
                    changed[i, path, name] = value
    return changed


def _differs(before: Any, after: Any) -> bool:
    try:
        return before is not after and bool(before != after)
    except Exception:  # values that cannot be compared count as changed
        return True


def _write_attributes(nodes: Sequence[Any], changed: dict[Any, Any]) -> None:
    for (i, path, name), value in changed.items():
        setattr(dict(nnx.iter_modules(nodes[i]))[path], name, value)
