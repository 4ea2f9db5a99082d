"""`value_and_grad` and `grad`: true losses and true gradients under a loss scale.

The loss is multiplied by the scale in float32 and differentiated, and the gradients are
divided by the same scale in float32 before anything else sees them. So a backward pass
in float16 keeps gradients that would have become zero, and clipping, logging, `psum`,
accumulation and Optax see the same gradients as without a scale.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp.errors import (
    MissingAux,
    MissingLossScaleArgument,
    NonFloatingLoss,
    NonScalarLoss,
)
from jaxmp.loss_scale._access import get_loss_scale
from jaxmp.loss_scale._differentiate import (
    call_keeping_states,
    check_integers,
    unpack,
    with_value,
)
from jaxmp.loss_scale._float16_losses import was_float16
from jaxmp.loss_scale.jmp_classes import NoOpLossScale
from jaxmp.loss_scale.unscale import LARGEST_FLOAT16_SCALE, scale_tree, unscale_tree
from jaxmp.loss_scale.window._window import read_window


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | tuple[int, ...] | Any = 0,
    has_aux: bool = False,
    *,
    micro_batches: int | None = None,
    batch_argnums: int | str | Sequence[int | str] | None = None,
    micro_batch_aux: str = "stack",
    data_axes: str | Sequence[str] | None = None,
    reduce_dtype: jax.typing.DTypeLike | None = None,
    gather: str | None = None,
    loss_is: str = "mean",
    grad_shardings: Any = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    transform: Callable[..., Any] = jax.value_and_grad,
    **transform_kwargs: Any,
) -> Callable[..., Any]:
    """Like `jax.value_and_grad`, computed under a loss scale and returned without it.

    Args:
      fun: function whose (first) result is the loss, a floating scalar of any dtype.
      argnums: positions to differentiate with respect to, as `transform` takes them.
      has_aux: whether `fun` returns `(loss, aux)`.
      micro_batches: how many parts to cut the batch into. They run one after the other
        in the memory of one, and losses and gradients are averaged in float32. If `fun`
        averages over examples, the result is the same up to rounding.
      batch_argnums: positions or keywords of the arguments to cut along the first axis
        of their arrays. The default is every argument that holds such arrays, is not
        differentiated, and is not a model or another state; first axes that differ are
        then an error. Part j takes the examples j, j + micro_batches, ... A single
        random key is split, and so are those of the random streams in nnx models.
      micro_batch_aux: `"stack"` gives the auxiliary outputs a first axis of parts;
        `"mean"` averages the floating ones and takes the others from the last part.
      data_axes: axis or axes of the mesh that the batch is divided over. Each device
        then sums the gradients of its own examples, through all micro-batches, and one
        reduction for the whole step adds up what the devices have. The mesh is that of
        `jax.set_mesh`, or else of the arguments. Each device takes consecutive
        examples, and auxiliary outputs come in the order of the batch. `fun` must not
        reduce along these axes itself.
      reduce_dtype: dtype in which gradients are summed over devices: `"bfloat16"` sends
        half of the bytes. Each device sums its own examples in float32, divides by the
        number of parts, and rounds last. The default is float32 at least.
      gather: when weights that are sharded along `data_axes` are gathered:
        `"micro_batch"`, the default, for each micro-batch, `"window"` once for all. A
        weight that `fun` casts to half before anything else travels in half.
      loss_is: `"mean"` or `"sum"`, what `fun` makes of the examples it is given.
      grad_shardings: where gradients shall lie on the mesh: a pytree like them, or a
        prefix of it, of `NamedSharding`, `PartitionSpec` or None. The default is where
        the parameters lie, if their types or the arrays show it; inside `jit` they
        do on explicit axes alone.
      mesh: the mesh, where neither the context nor the arguments show it.
      transform: what differentiates: `jax.value_and_grad`, `nnx.value_and_grad`,
        `equinox.filter_value_and_grad`, or one of the same form; their `grad`s work
        too. An nnx model with statistics, counters or keys needs `nnx.value_and_grad`.
      **transform_kwargs: passed on to `transform`: `allow_int`, `holomorphic`, ...

    Returns:
      A function `(*args, loss_scale, **kwargs)` that returns what `transform`'s would:
      `(loss, grads)` or `((loss, aux), grads)`. `loss_scale` is an optimizer state that
      holds one, an `nnx.Optimizer` or a `LossScale`; pass it on every call, since it
      changes from step to step. The loss is the one that `fun` returned. The gradients
      are those of the unscaled loss, in float32 at least. If the backward pass
      overflowed, they are not finite, and `loss_scaling` skips the step.

      What `fun` changes in an nnx model is averaged over parts.

    Raises:
      MissingLossScaleArgument: if called without `loss_scale=`.
      MissingLossScale: if `loss_scale` holds none.
      MultipleLossScales: if it holds several.
      NonScalarLoss: if the loss has axes, or is not a number.
      NonFloatingLoss: if the loss is an integer or boolean.
      MissingAux: if `has_aux` and `fun` does not return a pair.
      TransformError: if `transform` returns no value, or if an nnx model needs
        `nnx.value_and_grad`.
      MicroBatchError: if the batch cannot be cut.
      DataAxesError: if the axes or their mesh cannot be found or used.
      DataAxesOptionError: if an option has no meaning.
      CollectiveInLoss: if `fun` reduces along `data_axes` itself.

    References:
      Micikevicius et al., "Mixed Precision Training", 2018, section 3.2
      (https://arxiv.org/abs/1710.03740).

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> def loss_fn(w, x):
      ...     return jnp.sum(w * x)
      >>> step = jaxmp.value_and_grad(loss_fn)
      >>> scale = jaxmp.StaticLossScale(1024)
      >>> loss, grad = step(jnp.float16(3), jnp.float16(2), loss_scale=scale)
      >>> float(loss), float(grad), grad.dtype
      (6.0, 2.0, dtype('float32'))
    """
    transform = with_value(transform)
    if argnums != 0:
        transform_kwargs["argnums"] = argnums
    window = read_window(
        micro_batches,
        None if batch_argnums is None else _as_tuple(batch_argnums),
        argnums,
        micro_batch_aux,
        loss_is,
        data_axes,
        {
            "reduce_dtype": reduce_dtype,
            "gather": gather,
            "grad_shardings": grad_shardings,
            "mesh": mesh,
        },
    )

    @functools.wraps(fun)
    def value_and_grad_of_fun(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        holder = _pop_loss_scale(kwargs, fun)
        scale = get_loss_scale(holder)
        if window is not None and isinstance(holder, NoOpLossScale):
            window.check_unscaled()
        check_integers(transform, args, argnums, transform_kwargs)

        in_float16 = False

        def differentiate(
            scale: jax.Array, *args: Any, **kwargs: Any
        ) -> tuple[tuple[Any, Any], Any]:
            @functools.wraps(fun)
            def scaled(*args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, Any]]:
                nonlocal in_float16
                output = call_keeping_states(fun, transform, args, kwargs)
                loss, aux = _split(output, has_aux, fun)
                in_float16 = was_float16(loss)
                return scale_tree(loss, _effective(scale, in_float16)), (loss, aux)

            value_and_scaled_grad = transform(scaled, has_aux=True, **transform_kwargs)
            return unpack(value_and_scaled_grad(*args, **kwargs), transform)

        def unscale(grads: Any, scale: jax.Array) -> Any:
            return unscale_tree(grads, _effective(scale, in_float16))

        if window is None:
            value, scaled_grads = differentiate(scale, *args, **kwargs)
            grads = unscale(scaled_grads, scale)
        else:
            value, grads = window(differentiate, unscale, scale, args, kwargs)
        return (value if has_aux else value[0]), grads

    return value_and_grad_of_fun


def grad(
    fun: Callable[..., Any],
    argnums: int | tuple[int, ...] | Any = 0,
    has_aux: bool = False,
    *,
    transform: Callable[..., Any] = jax.value_and_grad,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Like `jax.grad`, computed under a loss scale and returned without it.

    Args:
      fun: as in `value_and_grad`.
      argnums: as in `value_and_grad`.
      has_aux: as in `value_and_grad`.
      transform: as in `value_and_grad`.
      **kwargs: all other keywords of `value_and_grad`.

    Returns:
      A function `(*args, loss_scale, **kwargs)` that returns `grads`, or
      `(grads, aux)` with `has_aux`.

    Raises:
      JaxmpError: the same errors as `value_and_grad`.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> square = lambda w: w**2
      >>> float(jaxmp.grad(square)(jnp.float16(3), loss_scale=jaxmp.StaticLossScale(8)))
      6.0
    """
    value_and_grad_of_fun = value_and_grad(
        fun, argnums, has_aux, transform=transform, **kwargs
    )

    @functools.wraps(fun)
    def grad_of_fun(*args: Any, **kwargs: Any) -> Any:
        value, grads = value_and_grad_of_fun(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_of_fun


def _pop_loss_scale(kwargs: dict[str, Any], fun: Callable[..., Any]) -> Any:
    if "loss_scale" not in kwargs:
        name = getattr(fun, "__name__", "loss_fn")
        raise MissingLossScaleArgument(
            "The gradient function was called without loss_scale=. The scale changes "
            "from step to step, so pass the optimizer state on every call: "
            f"jaxmp.value_and_grad({name})(params, batch, loss_scale=opt_state)"
        )
    return kwargs.pop("loss_scale")


def _as_tuple(names: int | str | Sequence[int | str]) -> tuple[int | str, ...]:
    return (names,) if isinstance(names, (int, str)) else tuple(names)


def _split(output: Any, has_aux: bool, fun: Callable[..., Any]) -> tuple[Any, Any]:
    name = getattr(fun, "__name__", "the loss function")
    if has_aux and not (isinstance(output, (tuple, list)) and len(output) == 2):
        raise MissingAux(
            f"has_aux=True, but {name} returned {_describe(output)} in place of "
            "(loss, aux). Return a pair, or leave has_aux out."
        )
    loss: Any
    loss, aux = output if has_aux else (output, None)
    if isinstance(loss, (bool, int, float, complex)):
        loss = jnp.asarray(loss)
    if not _tree.is_array(loss) or jnp.ndim(loss) != 0:
        repair = (
            "If it returns (loss, aux), pass has_aux=True."
            if isinstance(loss, tuple)
            else "Average it, for example by jnp.mean(loss.astype(jnp.float32))."
        )
        raise NonScalarLoss(
            f"{name} returned {_describe(loss)} as its loss, which has to be a scalar. "
            f"{repair}"
        )
    if not _tree.is_inexact(loss):
        raise NonFloatingLoss(
            f"{name} returned a loss of dtype {loss.dtype}, which has no gradient. "
            "Compute it in a floating dtype, for example loss.astype(jnp.float32)."
        )
    return loss, aux


def _describe(x: Any) -> str:
    if _tree.is_array(x):
        return f"an array of shape {x.shape} and dtype {x.dtype}"
    return f"a {type(x).__name__}"


def _effective(scale: jax.Array, in_float16: bool) -> jax.Array:
    return jnp.minimum(scale, LARGEST_FLOAT16_SCALE) if in_float16 else scale
