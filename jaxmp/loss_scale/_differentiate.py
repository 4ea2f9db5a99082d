"""The transform that differentiates for `value_and_grad`, and errors for a wrong one.

Flax and Equinox are looked up among the imported modules: whoever passes one of their
models has imported them.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxmp import _tree
from jaxmp.errors import TransformError

_GRADS = (
    ("jax", "grad", "value_and_grad"),
    ("flax.nnx", "grad", "value_and_grad"),
    ("equinox", "filter_grad", "filter_value_and_grad"),
)
_REPAIR = "transform=nnx.value_and_grad"


def with_value(transform: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces `jax.grad` and its like by the transform that returns the value too."""
    if isinstance(transform, functools.partial):
        inner = with_value(transform.func)
        return functools.partial(inner, *transform.args, **transform.keywords)
    for module, grad, value_and_grad in _GRADS:
        found = sys.modules.get(module)
        if found is not None and transform is getattr(found, grad, None):
            return getattr(found, value_and_grad)
    return transform


def unpack(result: Any, transform: Callable[..., Any]) -> tuple[Any, Any]:
    """Reads the `((scaled, (loss, aux)), grads)` that a transform returned.

    Returns:
      `(loss, aux)` and the gradients.

    Raises:
      TransformError: if it returned anything else.
    """
    match result:
        case ((_, (loss, aux)), grads):
            return (loss, aux), grads
    name = getattr(transform, "__name__", repr(transform))
    raise TransformError(
        f"transform={name} returned {_form(result)} in place of ((loss, aux), grads). "
        "Pass one that returns the value too and takes has_aux=True: "
        "jax.value_and_grad, nnx.value_and_grad or equinox.filter_value_and_grad."
    )


def _form(result: Any) -> str:
    if isinstance(result, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in result)})"
    return f"a {type(result).__name__}"


def check_integers(transform: Any, args: Any, argnums: Any, options: Any) -> None:
    """Raises if JAX itself is to differentiate an nnx model with counters or keys.

    Raises:
      TransformError: naming the variable and the transform for such a model.
    """
    if transform is not jax.value_and_grad or options.get("allow_int"):
        return
    positions = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
    for i in positions:
        if not isinstance(i, int) or not -len(args) <= i < len(args):
            continue
        for path, variable in _variables(args[i]):
            for x in jax.tree.leaves(variable):
                if _tree.is_array(x) and not _tree.is_inexact(x):
                    raise TransformError(
                        f"The model in args[{i}] holds {path!r}, a "
                        f"{type(variable).__name__} of dtype {x.dtype}, which has no "
                        f"gradient. Differentiate with {_REPAIR}, which takes the "
                        "parameters alone and keeps what the model changes."
                    )


def call_keeping_states(
    fun: Callable[..., Any], transform: Any, args: Any, kwargs: Any
) -> Any:
    """Calls a loss function, and raises if its changes to an nnx model would be lost.

    JAX gives a differentiated function copies of the models that it differentiates.
    What the function writes into a copy, such as BatchNorm statistics or counters, is
    lost; into any other model it cannot write.

    Raises:
      TransformError: naming the variable, if JAX itself differentiates.
    """
    if transform is not jax.value_and_grad:
        return fun(*args, **kwargs)
    given = {f"args[{i}]": x for i, x in enumerate(args)} | kwargs
    before = [(*found, jax.tree.leaves(found[1])) for found in _written(given)]
    try:
        output = fun(*args, **kwargs)
    except Exception as error:
        if type(error).__name__ != "TraceContextError":
            raise
        raise TransformError(
            "The loss function changes an nnx model from inside jax.value_and_grad, "
            f"which Flax refuses: {error} Pass the model as an argument, and "
            f"differentiate with {_REPAIR}; {_OR_EVAL}"
        ) from error
    for path, variable, old in before:
        new = jax.tree.leaves(variable)
        if len(old) != len(new) or any(x is not y for x, y in zip(old, new)):  # noqa: B905
            raise TransformError(
                f"The loss function changes {path!r}, a {type(variable).__name__} of "
                "an nnx model, in a copy that jax.value_and_grad made of it: the "
                f"change would be lost. Differentiate with {_REPAIR}; {_OR_EVAL}"
            )
    return output


def _written(tree: Any) -> Iterator[tuple[str, Any]]:
    """The variables that a function may write into.

    A model that is merged from a split state has that state's own variables. Flax's
    transformations, such as `nnx.remat`, write its parameters back as they were.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    split = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.State))
    states = [x for x in split if isinstance(x, nnx.State)]
    read_only = [x for _, x in _variables(states) if isinstance(x, nnx.Param)]
    for path, variable in _variables(tree):
        if all(variable is not x for x in read_only):
            yield path, variable


_OR_EVAL = "or make the model change nothing, for example with model.eval()."


def _variables(tree: Any) -> Iterator[tuple[str, Any]]:
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    for path, x in leaves:
        if isinstance(x, nnx.Variable):
            yield _tree.path_string(path), x
