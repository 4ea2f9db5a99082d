"""A function and its arguments as one program of operations, gradient included.

    fn(*args)  ->  jaxpr  ->  under autocast, if a policy is given
                          ->  with the gradient of its loss under a loss scale, if asked

Each stage is traced from the jaxpr of the one before. What JAX's differentiation makes
of custom rules, `jax.checkpoint` and loops is then in the program, equation by
equation, under the user's source lines and name scopes.
"""

import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._jaxpr.arguments import Leaf, flatten_arguments, named_leaves, state_name
from jaxmp._jaxpr.rewrite import with_lines_of_custom_rules
from jaxmp.casting import autocast
from jaxmp.errors import NonScalarLoss
from jaxmp.loss_scale import get_loss_scale
from jaxmp.loss_scale.unscale import LARGEST_FLOAT16_SCALE, scale_tree
from jaxmp.numerics.replay._keep_lines import Line, keep_lines


@dataclasses.dataclass(frozen=True)
class Output:
    """An output of a program.

    Attributes:
      kind: `"loss"`, `"output"`, `"state"` (what nnx modules are left with) or
        `"gradient"`.
      name: for people, such as `"the gradient of params['w']"`.
    """

    kind: str
    name: str


@dataclasses.dataclass(frozen=True)
class Program:
    """What is run, and on what.

    Attributes:
      jaxpr: jaxpr of the operations, with its constants.
      inputs: its arguments: the loss scale, if there is a gradient, then the arrays
        among the arguments of the function.
      input_names: for people, such as `"params['w']"`.
      outputs: one `Output` for each, those of the function first.
      loss_scale: the scale, or None in a program without gradients.
    """

    jaxpr: Any
    inputs: tuple[Any, ...]
    input_names: tuple[str, ...]
    outputs: tuple[Output, ...]
    loss_scale: float | None

    def at_scale(self, loss_scale: float) -> "Program":
        """The same program under another loss scale."""
        inputs = (jnp.float32(loss_scale), *self.inputs[1:])
        return dataclasses.replace(self, inputs=inputs, loss_scale=loss_scale)


def read_program(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    policy: Any = None,
    rules: Sequence[Any] = (),
    argnums: int | Sequence[int] = 0,
    backward: bool | None = None,
    loss_scale: Any = None,
    in_float32: Collection[Line] = (),
) -> Program:
    """Traces a function, and its gradient, to one program.

    Args:
      fn: function of pytrees that can be jitted; nnx modules may be arguments.
      args, kwargs: what it is called with; concrete arrays.
      policy: run `autocast(fn, policy, rules=rules)`; None runs `fn` as it is.
      rules: of autocast.
      argnums: arguments to differentiate with respect to: their floating arrays, and of
        nnx modules the parameters.
      backward: whether to differentiate; None does so if the function returns a
        floating scalar, alone or first in a tuple.
      loss_scale: a number, or whatever `get_loss_scale` takes; None is 1.
      in_float32: lines that autocast is to leave alone.

    Raises:
      NonScalarLoss: if `backward` is True and there is no loss.
    """
    arguments, arrays = flatten_arguments(fn, args, kwargs)
    arrays = [jnp.asarray(x) for x in arrays]
    jaxpr, out_tree = arguments.trace(fn, arrays, name_modules=True)
    leaves, modules = named_leaves(fn, args, kwargs)
    inputs = [leaf for leaf in leaves if _tree.is_array(leaf.value)]
    names, argument_of = [leaf.name for leaf in inputs], list(map(_varied_in, inputs))
    outputs = _outputs(jaxpr, out_tree, modules)
    if policy is not None:
        if in_float32:
            jaxpr = keep_lines(jaxpr, in_float32)
        flat = autocast(_function(jaxpr), policy, rules=rules)
        jaxpr = jax.make_jaxpr(flat)(*arrays)
    argnums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    wanted = [i for i, number in enumerate(argument_of) if number in argnums]
    has_loss = any(output.kind == "loss" for output in outputs)
    if backward and not (has_loss and wanted):
        name = getattr(fn, "__name__", "the function")
        raise NonScalarLoss(
            f"{name} returned no floating scalar, alone or first in a tuple, so there "
            "is no gradient to look at. Return the loss, or leave backward=True out."
            if not has_loss
            else f"argnums={argnums} name no floating array to differentiate {name} "
            "with respect to. Name the argument that holds the parameters."
        )
    if backward is False or not (has_loss and wanted):
        return Program(jaxpr, tuple(arrays), tuple(names), tuple(outputs), None)
    scale = _read_scale(loss_scale)
    loss = next(i for i, output in enumerate(outputs) if output.kind == "loss")
    gradients = [Output("gradient", f"the gradient of {names[i]}") for i in wanted]
    return Program(
        _differentiate(jaxpr, loss, wanted, scale, arrays),
        (jnp.float32(scale), *arrays),
        ("the loss scale", *names),
        (*outputs, *gradients),
        scale,
    )


def _function(jaxpr: Any) -> Callable[..., list[Any]]:
    return jax.extend.core.jaxpr_as_fun(with_lines_of_custom_rules(jaxpr))


def _differentiate(jaxpr, loss, wanted, scale, arrays) -> Any:
    """The jaxpr of outputs and gradients, as a function of the scale and the inputs."""
    run = _function(jaxpr)

    def scaled(varied, scale, arrays):
        arrays = list(arrays)
        for i, x in zip(wanted, varied, strict=True):
            arrays[i] = x
        outs = run(*arrays)
        if outs[loss].dtype == jnp.float16:
            scale = jnp.minimum(scale, LARGEST_FLOAT16_SCALE)
        with jax.named_scope("loss_scale"):
            return scale_tree(outs[loss], scale), outs

    def program(scale, *arrays):
        varied = [arrays[i] for i in wanted]
        gradient = jax.value_and_grad(scaled, has_aux=True)
        (_, outs), gradients = gradient(varied, scale, arrays)
        return [*outs, *gradients]

    return jax.make_jaxpr(program)(jnp.float32(scale), *arrays)


def _read_scale(loss_scale: Any) -> float:
    if loss_scale is None:
        return 1.0
    if isinstance(loss_scale, (int, float)) or _tree.is_array(loss_scale):
        return float(loss_scale)
    return float(get_loss_scale(loss_scale))


def _outputs(jaxpr: Any, out_tree: Any, modules: Sequence[str]) -> list[Output]:
    """Kinds and names of the outputs of `(output of the function, state)`."""
    avals = [v.aval for v in jaxpr.jaxpr.outvars]
    result, _ = jax.tree.unflatten(out_tree, range(len(avals)))
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    is_loss = isinstance(first, int) and (
        avals[first].shape == () and jnp.issubdtype(avals[first].dtype, jnp.floating)
    )
    paths = jax.tree_util.tree_leaves_with_path(
        jax.tree.unflatten(out_tree, range(len(avals)))
    )
    found = []
    for path, i in paths:
        if is_loss and i == first:
            found.append(Output("loss", "the loss"))
        elif path[0].idx == 0:
            where = jax.tree_util.keystr(path[1:])
            found.append(Output("output", f"the output{where}"))
        else:
            name = f"{modules[path[1].key]}.{state_name(path[2:])}"
            found.append(Output("state", f"the new {name}"))
    return found


def _is_differentiable(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1


def _varied_in(leaf: Leaf) -> int | None:
    """The position of the argument whose gradient a leaf is part of, if it has one."""
    nnx: Any = sys.modules.get("flax.nnx")
    is_kept = leaf.variable is not None and not isinstance(leaf.variable, nnx.Param)
    return leaf.position if not is_kept and _is_differentiable(leaf.value) else None
