"""Assertions about precision for users' own tests, in the style of chex."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp.errors import InvalidAssertion
from jaxmp.policy import PolicyLike
from jaxmp.report import audit
from jaxmp.testing._failure import fail, floating_dtype, listed


def assert_no_upcast(
    fn: Callable[..., Any], *args: Any, policy: PolicyLike | None = None, **kwargs: Any
) -> None:
    """Checks that no half value of a program silently becomes float32.

    Casts written in the program are allowed; `jaxmp.report.audit` has the details.

    Args:
      fn: a loss, a training step, or any other function that can be jitted.
      *args: its arguments: trees of arrays, `jax.ShapeDtypeStruct`s, Python numbers and
        nnx modules. Nothing is computed.
      policy: the policy that the program is meant to follow, as for `audit`.
      **kwargs: as `args`.

    Raises:
      AssertionError: if there is an upcast, with its line, its culprit and its repair.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jaxmp.testing import assert_no_upcast
      >>> x = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
      >>> assert_no_upcast(lambda x: x * 0.5 @ x, x)
      >>> assert_no_upcast(lambda x: x * np.float32(0.5) @ x, x)
      Traceback (most recent call last):
      AssertionError: [jaxmp] Assertion assert_no_upcast failed: ...
    """
    found = audit(fn, *args, policy=policy, **kwargs).findings
    upcasts = [finding for finding in found if finding.kind == "upcast"]
    if upcasts:
        count = "1 upcast" if len(upcasts) == 1 else f"{len(upcasts)} upcasts"
        fail("assert_no_upcast", f"{count} in the program.{listed(upcasts)}")


def assert_max_traces(
    fn: Callable[..., Any] | int | None = None, n: int | None = None
) -> Callable[..., Any]:
    """Makes a function fail when JAX traces it more than `n` times.

    It goes inside `jax.jit`, around the function itself. Calls without tracers, such as
    those under `jax.disable_jit()`, do not count.

    Args:
      fn: the function; left out in a decorator, `@assert_max_traces(n=1)`.
      n: how many traces are allowed.

    Returns:
      The function, which now counts its traces; or a decorator.

    Raises:
      InvalidAssertion: if `n` is not a count, or `fn` is already jitted.
      AssertionError: when traced once too often, with the shapes and dtypes of every
        trace.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmp.testing import assert_max_traces
      >>> double = jax.jit(assert_max_traces(lambda x: 2 * x, n=1))
      >>> double(jnp.ones(2)).shape, double(jnp.zeros(2)).shape
      ((2,), (2,))
      >>> double(jnp.ones(3))
      Traceback (most recent call last):
      AssertionError: [jaxmp] Assertion assert_max_traces failed: ...
    """
    if isinstance(fn, int) and n is None:
        fn, n = None, fn
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise InvalidAssertion(
            f"assert_max_traces() takes a count of traces, and n={n!r} is not one. "
            "Write assert_max_traces(fn, n=1)."
        )
    if fn is None:
        return functools.partial(assert_max_traces, n=n)
    if not callable(fn) or hasattr(fn, "lower"):
        raise InvalidAssertion(
            f"assert_max_traces() goes inside jax.jit, and {fn!r} is "
            f"{'already jitted' if callable(fn) else 'not a function'}. "
            "Write jax.jit(assert_max_traces(fn, n=1))."
        )
    return _counting(fn, n)


def _counting(fn: Callable[..., Any], n: int) -> Callable[..., Any]:
    traces: list[str] = []

    @functools.wraps(fn)
    def counted(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            traces.append(", ".join(map(_typed, leaves)))
        if len(traces) > n:
            name = getattr(fn, "__name__", repr(fn))
            fail(
                "assert_max_traces",
                f"{name!r} is traced {len(traces)} times, and {n} allowed. Whatever "
                f"changes from one line to the next is the cause:{listed(traces)}",
            )
        return fn(*args, **kwargs)

    return counted


def assert_precision_close(
    actual: Any,
    expected: Any,
    *,
    dtype: Any = "bfloat16",
    roundings: float = 4.0,
    atol: float = 0.0,
) -> None:
    """Checks that two trees are equal up to the rounding of a half dtype.

    For each floating leaf, the Euclidean distance is compared with the norm of the
    expected leaf: single elements close to zero may share no digit. Other leaves have
    to be equal.

    Args:
      actual: a tree of arrays, computed in `dtype`; stored in any floating dtype.
      expected: the same tree, computed in float32.
      dtype: the half dtype.
      roundings: the tolerance, in units of the distance from 1 to the next number in
        `dtype`, relative to the norm of each leaf. The unit is 0.8 % in bfloat16 and
        0.1 % in float16. One operation rounds by at most half a unit; a network of a
        few layers needs about four.
      atol: a tolerance for each element, added to the relative one.

    Raises:
      InvalidAssertion: if `dtype` is not a floating dtype.
      AssertionError: if a leaf is too far off, with its path and its distance.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmp.testing import assert_precision_close
      >>> x = {"w": jnp.linspace(1.0, 2.0, 5)}
      >>> assert_precision_close({"w": x["w"].astype(jnp.bfloat16)}, x)
      >>> assert_precision_close({"w": x["w"] * 1.1}, x)
      Traceback (most recent call last):
      AssertionError: [jaxmp] Assertion assert_precision_close failed: ...
    """
    name = "assert_precision_close"
    dtype = floating_dtype(dtype)
    allowed = roundings * float(jnp.finfo(dtype).eps)
    structures = jax.tree.structure(actual), jax.tree.structure(expected)
    if structures[0] != structures[1]:
        fail(name, f"the trees differ: {structures[0]} and {structures[1]}.")
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(expected),
        strict=True,
    )
    off = [
        f"{_tree.path_string(path) or 'the array'} {difference}"
        for (path, x), y in pairs
        if (difference := _difference(np.asarray(x), np.asarray(y), allowed, atol))
    ]
    if off:
        limit = f"{roundings:g} roundings of {dtype}, {allowed:.2%} of the norm"
        count = f"{len(off)} of {structures[1].num_leaves}"
        fail(name, f"{count} leaves are not within {limit}.{listed(off)}")


def _difference(x: Any, y: Any, allowed: float, atol: float) -> str:
    """How a leaf differs by more than is allowed; empty if it is close enough."""
    if x.shape != y.shape:
        return f"has the shape {x.shape}, and {y.shape} is expected"
    if not all(jnp.issubdtype(z.dtype, jnp.inexact) for z in (x, y)):
        return "" if np.array_equal(x, y) else "differs, and is not a floating array"
    kind = complex if jnp.issubdtype(x.dtype, jnp.complexfloating) else float
    x, y = x.astype(kind), y.astype(kind)
    finite = np.isfinite(y)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return "is not NaN or infinite where that is expected"
    if not np.isfinite(x[finite]).all():
        count = np.count_nonzero(~np.isfinite(x[finite]))
        return f"has {count} elements that are NaN or infinite"
    x, y = np.where(finite, x, 0), np.where(finite, y, 0)
    far, size = float(np.linalg.norm(x - y)), float(np.linalg.norm(y))
    if far <= allowed * size + atol * x.size**0.5:
        return ""
    place = np.unravel_index(np.argmax(abs(x - y)), x.shape)
    at = f" at {list(map(int, place))}" if x.shape else ""
    relative = f"{far / size:.2%} off" if size else f"{far:.3g} from zero"
    found, wanted = x[place], y[place]
    return f"is {relative}; the furthest element{at} is {found:.6g}, not {wanted:.6g}"


def _typed(leaf: Any) -> str:
    is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    return f"{leaf.dtype}{list(leaf.shape)}" if is_array else repr(leaf)
