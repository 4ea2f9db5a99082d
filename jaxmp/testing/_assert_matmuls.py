"""Assertions about the dtypes of a program's matmuls and convolutions."""

import collections
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from jaxmp.errors import InvalidAssertion
from jaxmp.report import audit
from jaxmp.report.audit.records import Matmul, at
from jaxmp.testing._failure import fail, floating_dtype, listed


def assert_matmuls_in(
    dtype: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Checks that every floating matmul and convolution of a program is in one dtype.

    Integer matmuls are left out, unless it is a policy that multiplies in int8.

    Args:
      dtype: the dtype of both operands; they may accumulate in any other.
      fn: a loss, a training step, or any other function that can be jitted.
      *args: the arguments of `fn`, as for `assert_no_upcast`.
      **kwargs: as `args`.

    Raises:
      AssertionError: if a matmul is in another dtype, with its line; or if there is no
        matmul at all.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> from jaxmp.testing import assert_matmuls_in
      >>> w = jnp.ones((8, 8))
      >>> assert_matmuls_in("float32", jnp.matmul, w, w)
      >>> assert_matmuls_in("bfloat16", jaxmp.autocast(jnp.matmul), w, w)
    """
    name = str(floating_dtype(dtype))
    matmuls = [
        m
        for m in audit(fn, *args, **kwargs).matmuls
        if m.is_quantized or all(jnp.issubdtype(d, jnp.floating) for d in m.operands)
    ]
    if not matmuls:
        fail("assert_matmuls_in", "the program has no floating matmul.")
    wrong = collections.Counter[str]()
    for m in matmuls:
        if m.operands != (name, name):
            wrong[f"{at(m.source)}: {m.operation} of {_dtypes(m)}{_inside(m)}"] += (
                m.times
            )
    if wrong:
        lines = [f"{line} ({times} x)" for line, times in wrong.items()]
        share = f"{wrong.total()} of {sum(m.times for m in matmuls)}"
        fail("assert_matmuls_in", f"{share} matmuls are not in {name}.{listed(lines)}")


def assert_matmuls_in_half(
    fn: Callable[..., Any], share: float = 0.9
) -> Callable[..., None]:
    """Checks that most of a program's matmul FLOPs are computed in half.

    A matmul is in half if both its operands are float16, bfloat16 or narrower, such as
    what a policy with `quantize` multiplies in float8 or int8. Convolutions count as
    matmuls. So do the matmuls in jitted and rematerialised functions, in functions with
    their own derivative rules, in loops (as often as they run; a `while` counts once)
    and in every branch of a `cond`. Pallas kernels and integer matmuls of the program's
    own do not count.

    Args:
      fn: a function that can be jitted: a loss, a whole training step, a function under
        `jaxmp.autocast`, `model.apply` of a module under `jaxmp.apply_policy`, an nnx
        module. To count the backward pass, give a gradient function.
      share: the part of the FLOPs that has to be in half, above 0 and up to 1.

    Returns:
      A function of the arguments of `fn`: trees of arrays, `jax.ShapeDtypeStruct`s,
      Python numbers, strings and nnx modules. Nothing is computed or compiled.

    Raises:
      InvalidAssertion: if `fn` cannot be called, or `share` is out of range.
      AssertionError: when called, if too few FLOPs are in half, with the share found
        and the largest wide matmuls, their lines and FLOPs; or if there is no matmul.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmp
      >>> from jaxmp.testing import assert_matmuls_in_half
      >>> def loss(w, x):
      ...     return jnp.mean((x @ w) ** 2)
      >>> w, x = jnp.ones((8, 8)), jnp.ones((4, 8))
      >>> assert_matmuls_in_half(jax.grad(jaxmp.autocast(loss)))(w, x)
      >>> assert_matmuls_in_half(jax.grad(loss))(w, x)
      Traceback (most recent call last):
      AssertionError: [jaxmp] Assertion assert_matmuls_in_half failed: 0% of ...
    """
    if not callable(fn):
        raise InvalidAssertion(
            f"assert_matmuls_in_half() takes a function, and {fn!r} is not one. Write "
            "assert_matmuls_in_half(loss_fn)(params, batch)."
        )
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not is_number or not 0 < share <= 1:
        raise InvalidAssertion(
            f"share={share!r} is not a share of the FLOPs. Write a number above 0 and "
            "up to 1: assert_matmuls_in_half(fn, share=0.9)(*args)."
        )
    return functools.partial(_check_share, fn, share)


def _check_share(
    fn: Callable[..., Any], share: float, /, *args: Any, **kwargs: Any
) -> None:
    name = "assert_matmuls_in_half"
    matmuls = [
        m
        for m in audit(fn, *args, **kwargs).matmuls
        if m.is_quantized or any(jnp.issubdtype(d, jnp.inexact) for d in m.operands)
    ]
    total = sum(m.flops for m in matmuls)
    if not total:
        fail(name, "the program has no floating matmul.")
    wide = [m for m in matmuls if not _is_half(m)]
    found = 1 - sum(m.flops for m in wide) / total
    if found < share:
        fail(
            name,
            f"{_percent(found)} of the matmul FLOPs are in half, and "
            f"{_percent(share)} are asked for. The largest matmuls that are not:"
            f"{listed(_largest(wide, total))}\n{_advice(wide)}",
        )


def _is_half(matmul: Matmul) -> bool:
    return all(jnp.dtype(d).itemsize <= 2 for d in matmul.operands)


def _largest(matmuls: Iterable[Matmul], total: int) -> list[str]:
    """One row for each line, shape and dtype, the costliest first."""
    groups: dict[Any, list[Matmul]] = {}
    for m in matmuls:
        key = m.source, m.operation, m.operands, m.shape, m.is_backward
        groups.setdefault(key, []).append(m)
    rows = []
    for members in sorted(groups.values(), key=lambda g: -sum(m.flops for m in g)):
        m, flops = members[0], sum(m.flops for m in members)
        upcast = ", made float32 by a silent upcast" if m.is_widened else ""
        backward = ", in the backward pass" if m.is_backward else ""
        rows.append(
            f"{at(m.source)}: {m.operation} {m.shape} of {_dtypes(m)}{_inside(m)}: "
            f"{_count(flops)}, {_percent(flops / total)} of all "
            f"({sum(m.times for m in members)} x){backward}{upcast}"
        )
    return rows


def _advice(wide: Iterable[Matmul]) -> str:
    if any(m.is_widened for m in wide):
        return (
            "assert_no_upcast(fn, *args) names what made them float32 and how to "
            "write it instead."
        )
    return (
        "Put jaxmp.autocast around the function or jaxmp.apply_policy around the "
        "model. If one is there, jaxmp.explain or jaxmp.describe says why they stay."
    )


def _dtypes(matmul: Matmul) -> str:
    return " and ".join(dict.fromkeys(matmul.operands))


def _inside(matmul: Matmul) -> str:
    return f" in {matmul.path}" if matmul.path else ""


def _percent(share: float) -> str:
    """Rounds down: a share that falls just short must not look sufficient."""
    return f"{int(share * 1000 + 1e-9) / 10:g}%"


def _count(flops: int) -> str:
    for unit, name in ((10**9, "GFLOPs"), (10**6, "MFLOPs"), (10**3, "kFLOPs")):
        if flops >= unit:
            return f"{flops / unit:.3g} {name}"
    return f"{flops} FLOPs"
