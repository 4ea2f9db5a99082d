"""`audit`: the dtypes of a program, read from its jaxpr, without compiling it."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._jaxpr.atoms import is_half
from jaxmp._jaxpr.calls import bodies
from jaxmp._jaxpr.types import Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp._jaxpr.walk import walk
from jaxmp.policy import PolicyLike, get_policy
from jaxmp.report.audit._alignment import misalignments
from jaxmp.report.audit._dataflow import Context, Dataflow
from jaxmp.report.audit._origins import argument_value
from jaxmp.report.audit._recorder import Recorder
from jaxmp.report.audit._residuals import residuals
from jaxmp.report.audit._result import Audit
from jaxmp.report.audit._trace import trace
from jaxmp.report.audit.records import Matmul


def audit(
    fn: Callable[..., Any], *args: Any, policy: PolicyLike | None = None, **kwargs: Any
) -> Audit:
    """Finds where a program computes in another dtype than it is meant to.

    The program is traced and read as it stands; it is neither compiled nor changed.
    `policy` is only what it is measured against. To audit a function under autocast,
    or a module under `apply_policy`, pass it as such:
    `audit(jaxmp.autocast(loss), params, batch)`.

    - Matmuls and convolutions, with their dtypes, FLOPs, and the user's line.
    - *Silent widenings*: a half value that becomes float32 because it meets a float32
      operand: an `np.float32` scalar, a constant, a parameter. A cast that is written
      down, as `x.astype(jnp.float32)`, is not silent. Neither is what a float32
      operand widens in a layer that casts its result back, nor what autocast decides.
    - *Sums in half*: a loop's carry, a `scatter-add`, a `cumsum` and so on, whose
      accumulator has too few bits for its number of terms.
    - What is kept for the backward pass, by dtype.
    - float32 collectives, and shapes that tensor cores or a TPU have to pad.

    A `while` loop with an unknown number of iterations counts once, and so does every
    branch of a `cond`. Pallas kernels and `custom_linear_solve` are not looked into.

    Args:
      fn: a loss, a whole training step, or any other function that can be jitted; an
        nnx module is one too.
      *args: what it is called with: trees of arrays, `jax.ShapeDtypeStruct`s, Python
        numbers, strings and nnx modules.
      policy: what the program is meant to compute in, as `get_policy` takes it; by
        default the half dtype that occurs in it.
      **kwargs: as `args`.

    Returns:
      An `Audit`: `print` shows it, and `findings` lists what to mend.

    Raises:
      NotAnArray: for an argument that is not an array.
      StepDoesNotTrace: if `fn` raises while it is traced, or is not a function.
      PolicyError: for a policy that cannot be read.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jaxmp.report import audit
      >>> def attention(q, k):
      ...     return jax.nn.softmax(q @ k.T * np.float32(0.125)) @ k
      >>> q = jax.ShapeDtypeStruct((128, 64), jnp.bfloat16)
      >>> found = audit(attention, q, q)
      >>> found.widenings[0].culprit, found.widenings[0].source.line
      ('a NumPy or JAX scalar of float32, 0.125', 2)
      >>> found.half_flops
      0.5
    """
    expected = None if policy is None else jnp.dtype(get_policy(policy).compute_dtype)
    jaxpr, names = trace(fn, args, kwargs)
    recorder = _record(jaxpr, names)
    silent = recorder.widenings.silent_keys()
    matmuls = tuple(
        m._replace(is_widened=bool(silent & groups)) for m, groups in recorder.matmuls
    )
    if expected is None:
        half = _half_of(matmuls, jaxpr)
    else:
        half = str(expected) if expected in _tree.HALF else None
    return Audit(
        half=half,
        matmuls=matmuls,
        widenings=recorder.widenings.found(),
        residuals=residuals(jaxpr),
        collectives=tuple(recorder.collectives),
        misalignments=misalignments(matmuls),
        accumulations=recorder.accumulations.found(),
    )


def _record(jaxpr: Jaxpr, names: Iterable[str]) -> Recorder:
    opened, recorder = open_jaxpr(jaxpr), Recorder()
    named = zip(opened.invars, names, strict=True)
    inputs = [argument_value(v, name) for v, name in named]
    flow = Dataflow(recorder.look, recorder.accumulations.enter)
    recorder.outputs(opened.outvars, flow.walk(jaxpr, inputs, Context()))
    return recorder


def _half_of(matmuls: Iterable[Matmul], jaxpr: Jaxpr) -> str | None:
    """The half dtype of the matmuls, or else of anything in the program."""
    flops = collections.Counter[str]()
    for matmul in matmuls:
        for dtype in matmul.operands:
            flops[dtype] += matmul.flops * (dtype in ("float16", "bfloat16"))
    dtype, most = max(flops.items(), key=lambda item: item[1], default=("", 0))
    if most:
        return dtype
    made = (v for eqn in walk(jaxpr, bodies) for v in eqn.outvars)
    found = (v for v in (*open_jaxpr(jaxpr).invars, *made) if is_half(v))
    return next((str(v.aval.dtype) for v in found), None)
