"""The public functions of JAX, each with arguments, and where autocast runs them.

`python -m tests.support.surface` prints the table of `docs/surface.md`.
"""

import collections
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.calls import held
from jaxmp._jaxpr.primitives import CAST, LAYOUT, MATMULS
from jaxmp.casting import autocast
from jaxmp.testing import equations
from tests.support.surface_arguments import ARGUMENTS, DEFAULTS, EXCLUDED, VARIANTS

MODULES = (
    "jax.nn",
    "jax.numpy",
    "jax.numpy.linalg",
    "jax.numpy.fft",
    "jax.scipy.special",
    "jax.scipy.stats",
    "jax.scipy.linalg",
    "jax.scipy.signal",
    "jax.scipy.fft",
    "jax.scipy.ndimage",
    "jax.scipy.integrate",
    "jax.scipy.interpolate",
    "jax.scipy.optimize",
    "jax.scipy.cluster.vq",
    "jax.image",
    "jax.ops",
)


class SurfaceFunction(NamedTuple):
    """A function of JAX and arguments for it.

    Attributes:
      name: where it is found, as in `jax.nn.gelu`; variants end in `[...]`.
      fn: a function of `args` alone.
      args: float32 arrays, whose numbers bfloat16 and float16 can hold.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[np.ndarray, ...]


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Iterates over the public functions of the modules, with their names."""
    for module in MODULES:
        yield from _functions_in(module, importlib.import_module(module))


def _functions_in(path: str, module: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in sorted(vars(module) if path.count(".") > 2 else dir(module)):
        if name.startswith("_"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                value = getattr(module, name)
            except (AttributeError, DeprecationWarning):
                continue  # on its way out
        if path == "jax.scipy.stats" and inspect.ismodule(value):
            yield from _functions_in(f"{path}.{name}", value)
        elif callable(value) and not isinstance(value, type):
            yield f"{path}.{name}", value


def surface() -> tuple[list[SurfaceFunction], list[str]]:
    """Lists the public functions of JAX.

    Returns:
      Those that can be called, with arguments; and the names of those that are neither
      excluded nor callable with any of the default arguments.
    """
    found, unknown = [], []
    for name, fn in public_functions():
        if name in EXCLUDED:
            continue
        calls = (ARGUMENTS[name],) if name in ARGUMENTS else DEFAULTS
        bound = (call.bind(fn) for call in calls)
        for call, args in bound:
            if name in ARGUMENTS or _is_traceable(call, args):
                found.append(SurfaceFunction(name, call, args))
                break
        else:
            unknown.append(name)
    for name, (fn, call) in VARIANTS.items():
        bound_fn, args = call.bind(fn)
        found.append(SurfaceFunction(name, bound_fn, args))
    return found, unknown


def _is_traceable(fn: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    # Whatever a function raises for arguments that it does not take.
    try:
        jax.eval_shape(fn, *args)
    except Exception:
        return False
    return True


KINDS = {
    "matmul": "matmuls in half",
    "half": "in half",
    "float32": "in float32, at least in part",
}
"""Where autocast runs a function that stands between two matmuls."""

_SCOPE = "surface"
_WIDE = frozenset(map(np.dtype, ("float32", "complex64")))

ONE = np.ones((1, 1), np.float32)
"""A weight whose matmuls change no number: only dtypes."""


def pass_through(one: Any, x: Any) -> Any:
    """A matmul that gives a float32 array back, in half under autocast."""
    x = jnp.asarray(x)
    if x.dtype != jnp.float32:
        return x
    return (x.reshape(-1, 1) @ one).reshape(x.shape)


def between_matmuls(function: SurfaceFunction) -> Callable[..., Any]:
    """The function of a weight `ONE` and `args` that reads and feeds matmuls."""

    def run(one: Any, *args: Any) -> Any:
        halves = [pass_through(one, x) for x in args]
        with jax.named_scope(_SCOPE):
            result = function.fn(*halves)
        return jax.tree.map(lambda x: pass_through(one, x), result)

    return run


def kind_of(function: SurfaceFunction) -> str | None:
    """Which of `KINDS` a function is; None if it gives no float back."""
    results = jax.eval_shape(function.fn, *function.args)
    if not any(_is_float(x) for x in jax.tree.leaves(results)):
        return None
    cast = autocast(between_matmuls(function), "mixed_bfloat16")
    jaxpr = jax.make_jaxpr(cast)(ONE, *function.args)
    inside = [
        (equation.primitive.name, {v.aval.dtype for v in equation.invars})
        for scope, equation in equations(jaxpr)
        if _SCOPE in scope and _computes(equation)
    ]
    if any(name in MATMULS and dtypes & _tree.HALF for name, dtypes in inside):
        return "matmul"
    return "float32" if any(_WIDE & dtypes for _, dtypes in inside) else "half"


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _computes(equation: Any) -> bool:
    """False for casts, for movement of data, and for calls, whose bodies count."""
    moves = equation.primitive.name in (CAST, *LAYOUT)
    is_float = any(_is_float(v.aval) for v in equation.outvars)
    return is_float and not moves and not held(equation)


def kinds() -> dict[str, str]:
    """The kind of each function that gives floats back, by name."""
    functions, _ = surface()
    found = {f.name: kind_of(f) for f in functions if "[" not in f.name}
    return {name: kind for name, kind in found.items() if kind is not None}


def surface_as_markdown() -> str:
    """Prints the table for the documentation."""
    rows = collections.defaultdict(list)
    for name, kind in kinds().items():
        module = max((m for m in MODULES if name.startswith(f"{m}.")), key=len)
        rows[module, kind].append(name.removeprefix(f"{module}."))
    lines = ["| module | autocast runs it | functions |", "|---|---|---|"]
    for module in MODULES:
        for kind, title in KINDS.items():
            if names := rows[module, kind]:
                listed = ", ".join(f"`{name}`" for name in sorted(names))
                lines.append(f"| `{module}` | {title} | {listed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(surface_as_markdown())
