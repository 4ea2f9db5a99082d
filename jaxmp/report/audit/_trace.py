"""Traces what is audited, and names its arguments as its author did."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax

from jaxmp import _tree
from jaxmp.casting._arguments import flatten_arguments
from jaxmp.errors import NotAnArray, StepDoesNotTrace

_SCALARS = (bool, int, float, complex)
_STATIC = (*_SCALARS, str)


def trace(fn: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, list[str]]:
    """Traces a function without computing anything.

    Args:
      fn: a function, jitted or not; an nnx module or a method of one stands for a
        function of that module.
      args, kwargs: trees of arrays, `jax.ShapeDtypeStruct`s, Python numbers, strings
        and nnx modules; a function may be an argument too.

    Returns:
      Its jaxpr, and the name of each of the jaxpr's inputs.

    Raises:
      NotAnArray: for an argument that is none.
      StepDoesNotTrace: if `fn` raises while it is traced, or is no function.
    """
    if not callable(fn):
        raise StepDoesNotTrace(
            f"audit() takes a function and its arguments, and {fn!r} is no function. "
            "Write audit(loss_fn, params, batch)."
        )
    called = _name(fn)
    fn, args = _open_module(fn, args)
    named = _named_leaves(fn, args, kwargs)
    _check(named)
    try:
        arguments, arrays = flatten_arguments(fn, args, kwargs)
        jaxpr, _ = arguments.trace(fn, arrays, name_modules=True)
    except Exception as error:
        shown = ", ".join(f"{name}: {_shown(leaf)}" for name, leaf in named[:8])
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        raise StepDoesNotTrace(
            f"{called!r} does not trace with {shown or 'no arguments'}{more}. "
            f"{type(error).__name__}: {error}\n"
            "Call it with these shapes and dtypes under jax.make_jaxpr to see the "
            "whole traceback."
        ) from error
    return jaxpr, [name for name, leaf in named if _is_array(leaf)]


def _open_module(fn: Any, args: Any) -> tuple[Any, Any]:
    """Makes an nnx module that is called, or whose method is, the first argument.

    Its variables are then inputs of the program, and may be written to.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(fn, nnx.Module):
        return type(fn).__call__, (fn, *args)
    owner = getattr(fn, "__self__", None)
    if nnx is not None and isinstance(owner, nnx.Module):
        return fn.__func__, (owner, *args)
    return fn, args


def _named_leaves(fn: Any, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
    """Every leaf with its name; the state of nnx modules comes first, as traced."""
    nnx = sys.modules.get("flax.nnx")

    def is_module(x):
        return nnx is not None and isinstance(x, (nnx.Module, nnx.Rngs))

    names = _parameter_names(fn, len(args))
    state, leaves = [], []
    for root, tree in [*zip(names, args, strict=True), *kwargs.items()]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_module)
        for path, leaf in flat:
            name = root + jax.tree_util.keystr(path)
            if nnx is not None and is_module(leaf):
                inside, _ = jax.tree_util.tree_flatten_with_path(nnx.state(leaf))
                state += [(f"{name}.{_tree.path_string(p)}", x) for p, x in inside]
            else:
                leaves.append((name, leaf))
    return [*state, *leaves]


def _parameter_names(fn: Any, count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return (names + [f"args[{i}]" for i in range(len(names), count)])[:count]


def _check(named: list[tuple[str, Any]]) -> None:
    for name, leaf in named:
        is_option = callable(leaf) and name.isidentifier()
        if not _is_array(leaf) and not is_option and not isinstance(leaf, _STATIC):
            raise NotAnArray(
                f"The argument {name} of audit() is no array but {leaf!r}. Arguments "
                "are arrays, jax.ShapeDtypeStructs, numbers, strings, nnx modules, and "
                "trees of these; close over anything else: "
                "audit(lambda x: f(x, option), x)."
            )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def _shown(leaf: Any) -> str:
    if _is_array(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return repr(leaf)


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", None) or repr(fn)
