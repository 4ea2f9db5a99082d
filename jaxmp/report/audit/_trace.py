"""Traces what is audited, and names its arguments as its author did."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmp import _tree
from jaxmp._jaxpr.argument_names import named_leaves
from jaxmp._jaxpr.arguments import flatten_arguments
from jaxmp._jaxpr.types import Jaxpr
from jaxmp.errors import NotAnArray, StepDoesNotTrace
from jaxmp.report.audit._origins import array_name


def trace(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Jaxpr, list[str]]:
    """Traces a function without computing anything.

    Args:
      fn: a function, jitted or not; an nnx module or a method of one stands for a
        function of that module.
      args, kwargs: trees of arrays, `jax.ShapeDtypeStruct`s, Python numbers, strings
        and nnx modules; a function may be an argument too.

    Returns:
      Its jaxpr, and the name of each of the jaxpr's inputs.

    Raises:
      NotAnArray: for an argument that is not an array.
      StepDoesNotTrace: if `fn` raises while it is traced, or is not a function.
    """
    if not callable(fn):
        raise StepDoesNotTrace(
            f"audit() takes a function and its arguments, and {fn!r} is not a "
            "function. Write audit(loss_fn, params, batch)."
        )
    name = getattr(fn, "__name__", None) or repr(fn)
    fn, args = _open_module(fn, args)
    named = [(leaf.name, leaf.value) for leaf in named_leaves(fn, args, kwargs)[0]]
    _check(named)
    try:
        arguments, arrays = flatten_arguments(fn, args, kwargs)
        jaxpr, _ = arguments.trace(fn, arrays, name_modules=True)
    except Exception as error:
        shown = ", ".join(f"{name}: {_shown(leaf)}" for name, leaf in named[:8])
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        raise StepDoesNotTrace(
            f"{name!r} does not trace with {shown or 'no arguments'}{more}. "
            f"{type(error).__name__}: {error}\n"
            "Call it with these shapes and dtypes under jax.make_jaxpr to see the "
            "whole traceback."
        ) from error
    return jaxpr, [name for name, leaf in named if _is_array(leaf)]


def _open_module(fn: Any, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
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


def _check(named: Sequence[tuple[str, Any]]) -> None:
    static = (*_tree.SCALARS, str)
    for name, leaf in named:
        is_option = callable(leaf) and name.isidentifier()
        if not _is_array(leaf) and not is_option and not isinstance(leaf, static):
            raise NotAnArray(
                f"The argument {name} of audit() is not an array but {leaf!r}. "
                "Arguments are arrays, jax.ShapeDtypeStructs, numbers, strings, nnx "
                "modules, and trees of these; close over anything else: "
                "audit(lambda x: f(x, option), x)."
            )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def _shown(leaf: Any) -> str:
    return array_name(leaf) if _is_array(leaf) else repr(leaf)
