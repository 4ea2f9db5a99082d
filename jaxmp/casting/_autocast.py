"""`autocast`: any JAX function in mixed precision, operation by operation.

The function is traced to a jaxpr, the jaxpr is planned (`planner`), and the plan is run
(`run`). No mode is entered: what comes out is a function of the same arguments, to be
jitted, differentiated and batched like the one that went in.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core

from jaxmp import _tree
from jaxmp._jaxpr.arguments import flatten_arguments
from jaxmp._jaxpr.marks import AUTOCAST_SCOPE, FULL_PRECISION_SCOPE
from jaxmp._jaxpr.types import Jaxpr
from jaxmp.casting import rules as _call_rules  # noqa: F401  registers their rules
from jaxmp.casting._check_function import check_function
from jaxmp.casting.kernels._interception import tracing, tracing_rule
from jaxmp.casting.kernels.half_operands import as_written, noting_float32
from jaxmp.casting.planner._ambient_precision import without_ambient_precision
from jaxmp.casting.planner._whole_function import check_rules, plan_jaxpr, read_settings
from jaxmp.casting.quantized.formats import warn_if_nothing
from jaxmp.casting.run._eager import compiled
from jaxmp.casting.run._whole_function import run_plan
from jaxmp.policy import PolicyLike, get_policy


def autocast(
    fn: Callable[..., Any] | None = None,
    policy: PolicyLike = "mixed_bfloat16",
    *,
    rules: Sequence[Any] = (),
    output_dtype: Any = None,
    half_residuals: bool = True,
    named_scopes: bool = True,
) -> Callable[..., Any]:
    """Makes a function compute its matmuls in half and its delicate parts in float32.

    Matmuls and convolutions, forward and backward, take the compute dtype of the
    policy; exponentials, logarithms, sums, norms, softmaxes and losses take float32 and
    hand their results back in half; everything else follows its neighbours. Weights are
    cast where they are used, and their gradients are float32. `explain` shows what was
    decided, and why.

    Args:
      fn: a function of pytrees that can be jitted. Arrays are traced; Python numbers,
        strings and other objects stay as they are. nnx modules among the arguments keep
        their state: what the function writes to them is written back.
      policy: what `get_policy` takes. Its compute dtype is used, and its
        `matmul_precision`, which applies to the matmuls that stay in float32.
      rules: `OpRule`s, by primitive, by path of scopes or modules, or by source
        function; the first that matches an operation decides. `PolicyRule`s with
        `path=` and `compute=` are taken too.
      output_dtype: dtype of the floating outputs. None: those of `fn`.
      half_residuals: keep only half-precision inputs of the float32 parts for the
        backward pass, and compute these parts again there. They are elementwise and
        reductions, so this saves memory and traffic; matmuls are never repeated.
      named_scopes: name what is computed in which dtype, as in
        `jaxmp/matmul/bfloat16` or `jaxmp/softmax/float32`, for HLO dumps and profiles.

    Returns:
      A function like `fn`, with the same outputs in the same dtypes. Without `fn`, a
      decorator.

    Raises:
      AutocastError: for a function that cannot be traced.
      AutocastRuleError: for a rule that cannot be read; when called, for one that
        matches nothing.

    References:
      Micikevicius et al., "Mixed Precision Training", 2018,
      https://arxiv.org/abs/1710.03740, section 3.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmp
      >>> @jaxmp.autocast
      ... def loss(w, x):
      ...     return jnp.mean(jax.nn.log_softmax(x @ w))
      >>> grads = jax.grad(loss)(jnp.ones((4, 2)), jnp.ones((3, 4)))
      >>> grads.dtype
      dtype('float32')
    """
    if fn is None:
        return functools.partial(
            autocast,
            policy=policy,
            rules=rules,
            output_dtype=output_dtype,
            half_residuals=half_residuals,
            named_scopes=named_scopes,
        )
    check_function(fn)
    settings = read_settings(policy, rules, half_residuals)
    if output_dtype is not None:
        output_dtype = get_policy(output_dtype).output_dtype

    def execute(
        jaxpr: Jaxpr, consts: Sequence[Any], arrays: Sequence[Any]
    ) -> list[Any]:
        plan, planner = plan_jaxpr(jaxpr, settings, output_dtype)
        check_rules(planner)
        warn_if_nothing(plan, settings.quantize, getattr(fn, "__name__", str(fn)))
        return run_plan(
            plan,
            jaxpr,
            consts,
            arrays,
            output_dtype,
            named_scopes=named_scopes,
            around_rules=functools.partial(tracing_rule, settings),
        )

    run = compiled(execute, settings.compute_dtype)
    as_it_is = with_output_dtype(fn, output_dtype)
    has_paths = any(rule.path is not None for rule in settings.rules)

    @functools.wraps(fn, updated=())
    def autocasted(*args: Any, **kwargs: Any) -> Any:
        if settings.is_plain:
            with jax.named_scope(AUTOCAST_SCOPE), as_written(), noting_float32():
                return as_it_is(*args, **kwargs)
        arguments, arrays = flatten_arguments(fn, args, kwargs)
        with without_ambient_precision(), tracing(settings):
            jaxpr, out_tree = arguments.trace(fn, arrays, name_modules=has_paths)
        outs = run(jaxpr, arrays)
        return arguments.finish(jax.tree.unflatten(out_tree, outs))

    return autocasted


def full_precision(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function so that no autocast around it changes a dtype inside.

    Args:
      fn: a function that is called, directly or not, by one under `autocast`.

    Returns:
      The same function under a name scope that `autocast` leaves alone. Its floating
      arguments arrive in the dtypes that they have without autocast.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> router = jaxmp.full_precision(lambda x, w: x @ w)
      >>> f = jaxmp.autocast(lambda x, w: router(x, w))
      >>> w = jnp.full((1, 1), 1.001)
      >>> bool(f(w, w) == w @ w)
      True
    """

    @functools.wraps(fn, updated=())
    def precise(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(FULL_PRECISION_SCOPE), as_written(), noting_float32():
            return fn(*args, **kwargs)

    return precise


def with_output_dtype(fn: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """The function with floating outputs in a dtype; in its own for None."""
    if dtype is None:
        return fn

    def cast_outputs(*args: Any, **kwargs: Any) -> Any:
        return _tree.cast_floating(fn(*args, **kwargs), dtype)

    return cast_outputs
