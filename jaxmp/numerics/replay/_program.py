"""A function and its arguments as one program of operations, gradient included.

    fn(*args)  ->  jaxpr  ->  under autocast, if a policy is given
                          ->  with the gradient of its loss under a loss scale, if asked

Each stage is traced from the jaxpr of the one before, so the program holds what JAX's
differentiation makes of custom rules, `jax.checkpoint` and loops, equation by equation,
under the user's source lines and name scopes.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._jaxpr.argument_names import Leaf, named_leaves, state_name
from jaxmp._jaxpr.arguments import flatten_arguments
from jaxmp._jaxpr.execution import as_function
from jaxmp._jaxpr.rewrite import with_lines_of_custom_rules
from jaxmp._jaxpr.types import Array, Arrays, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting import autocast
from jaxmp.errors import NonScalarLoss, NothingQuantizedWarning
from jaxmp.loss_scale import get_loss_scale
from jaxmp.loss_scale.unscale import LARGEST_FLOAT16_SCALE, scale_tree
from jaxmp.numerics.replay._float32_lines import Line, keep_lines
from jaxmp.policy import PolicyLike


@dataclasses.dataclass(frozen=True)
class Output:
    """An output of a program.

    Attributes:
      kind: `"state"` is what nnx modules are left with.
      name: for people, such as `"the output[0]"`; of a gradient, its parameter's.
    """

    kind: Literal["loss", "output", "state", "gradient"]
    name: str

    def __str__(self) -> str:
        return self.name if self.kind != "gradient" else f"the gradient of {self.name}"


@dataclasses.dataclass(frozen=True)
class Program:
    """What is run, and on what.

    Attributes:
      jaxpr: jaxpr of the operations, with its constants.
      inputs: its arguments: the loss scale, if there is a gradient, then the arrays
        among the arguments of the function.
      input_names: for people, such as `"params['w']"`.
      outputs: one `Output` for each, the function's own first.
      loss_scale: the scale that was asked for; None without gradients.
    """

    jaxpr: Jaxpr
    inputs: tuple[Array, ...]
    input_names: tuple[str, ...]
    outputs: tuple[Output, ...]
    loss_scale: float | None = None

    def at_scale(self, loss_scale: float) -> "Program":
        """The same program under another loss scale."""
        inputs = (jnp.float32(loss_scale), *self.inputs[1:])
        return dataclasses.replace(self, inputs=inputs, loss_scale=loss_scale)

    @property
    def loss_index(self) -> int | None:
        """Which of the outputs is the loss; None if the function returns none."""
        kinds = [output.kind for output in self.outputs]
        return kinds.index("loss") if "loss" in kinds else None

    @property
    def used_scale(self) -> float:
        """The loss scale that gradients are multiplied by: float16 losses limit it."""
        assert self.loss_scale is not None
        assert self.loss_index is not None
        dtype = open_jaxpr(self.jaxpr).outvars[self.loss_index].aval.dtype
        limit = LARGEST_FLOAT16_SCALE if dtype == jnp.float16 else math.inf
        return min(self.loss_scale, limit)

    def gradients(self, outs: Arrays) -> dict[str, Array]:
        """The gradients among the values of the outputs, by the parameter's name."""
        named = zip(self.outputs, outs, strict=True)
        return {output.name: x for output, x in named if output.kind == "gradient"}


def read_program(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    policy: PolicyLike | None = None,
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
      NonScalarLoss: if `backward` is True and the function returns no loss.
    """
    program, leaves = _trace(fn, args, kwargs)
    if policy is not None:
        jaxpr = keep_lines(program.jaxpr, in_float32) if in_float32 else program.jaxpr
        plain = _function(jaxpr)
        plain.__name__ = getattr(fn, "__name__", type(fn).__name__)
        half = autocast(plain, policy, rules=rules)
        jaxpr = jax.make_jaxpr(half)(*program.inputs)
        program = dataclasses.replace(program, jaxpr=jaxpr)
    argnums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    varied = [i for i, leaf in enumerate(leaves) if _varies(leaf, argnums)]
    if program.loss_index is not None and varied and backward is not False:
        return _differentiate(program, varied, read_scale(loss_scale))
    if backward:
        name = getattr(fn, "__name__", "the function")
        raise NonScalarLoss(
            f"{name} returned no floating scalar, alone or first in a tuple, so there "
            "is no gradient to look at. Return the loss, or leave backward=True out."
            if program.loss_index is None
            else f"argnums={argnums} name no floating array to differentiate {name} "
            "with respect to. Name the argument that holds the parameters."
        )
    return program


@contextlib.contextmanager
def trying_rules() -> Iterator[None]:
    """Rules that are only tried may well leave nothing to quantise: no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingQuantizedWarning)
        yield


def _trace(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Program, list[Leaf]]:
    """The function alone, and the leaves of its arguments that are its inputs."""
    arguments, arrays = flatten_arguments(fn, args, kwargs)
    arrays = tuple(jnp.asarray(x) for x in arrays)
    jaxpr, out_tree = arguments.trace(fn, arrays, name_modules=True)
    leaves, modules = named_leaves(fn, args, kwargs)
    leaves = [leaf for leaf in leaves if _tree.is_array(leaf.value)]
    names = tuple(leaf.name for leaf in leaves)
    outputs = tuple(_outputs(jaxpr, out_tree, modules))
    return Program(jaxpr, arrays, names, outputs), leaves


def _outputs(jaxpr: Jaxpr, out_tree: Any, modules: Sequence[str]) -> Iterator[Output]:
    """Kinds and names of the outputs of `(output of the function, state)`."""
    avals = [v.aval for v in open_jaxpr(jaxpr).outvars]
    places = jax.tree.unflatten(out_tree, range(len(avals)))
    result, _ = places
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    is_loss = isinstance(first, int) and (
        avals[first].shape == () and jnp.issubdtype(avals[first].dtype, jnp.floating)
    )
    for path, i in jax.tree_util.tree_leaves_with_path(places):
        if is_loss and i == first:
            yield Output("loss", "the loss")
        elif path[0].idx == 0:
            where = jax.tree_util.keystr(path[1:])
            yield Output("output", f"the output{where}")
        else:
            name = f"{modules[path[1].key]}.{state_name(path[2:])}"
            yield Output("state", f"the new {name}")


def _function(jaxpr: Jaxpr) -> Callable[..., list[Array]]:
    return as_function(with_lines_of_custom_rules(jaxpr))


def _varies(leaf: Leaf, argnums: Sequence[int]) -> bool:
    """Whether the loss is differentiated with respect to a leaf of the arguments."""
    dtype = leaf.value.dtype
    is_float = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
    return is_float and leaf.position in argnums and not leaf.is_module_state


def read_scale(loss_scale: Any) -> float:
    """The number in whatever holds a loss scale; 1 for None."""
    if loss_scale is None:
        return 1.0
    if isinstance(loss_scale, (int, float)) or _tree.is_array(loss_scale):
        return float(loss_scale)
    return float(get_loss_scale(loss_scale))


def _differentiate(program: Program, varied: Sequence[int], scale: float) -> Program:
    """The program with its gradients, as a function of the scale and the inputs."""
    run, loss = _function(program.jaxpr), program.loss_index
    assert loss is not None

    def scaled(
        values: Arrays, scale: Array, inputs: Arrays
    ) -> tuple[Array, list[Array]]:
        inputs = list(inputs)
        for i, x in zip(varied, values, strict=True):
            inputs[i] = x
        outs = run(*inputs)
        if outs[loss].dtype == jnp.float16:
            scale = jnp.minimum(scale, LARGEST_FLOAT16_SCALE)
        with jax.named_scope("loss_scale"):
            return scale_tree(outs[loss], scale), outs

    def with_gradients(scale: Array, *inputs: Array) -> list[Array]:
        gradient = jax.value_and_grad(scaled, has_aux=True)
        (_, outs), gradients = gradient([inputs[i] for i in varied], scale, inputs)
        return [*outs, *gradients]

    inputs = (jnp.float32(scale), *program.inputs)
    gradients = [Output("gradient", program.input_names[i]) for i in varied]
    return Program(
        jax.make_jaxpr(with_gradients)(*inputs),
        inputs,
        ("the loss scale", *program.input_names),
        (*program.outputs, *gradients),
        scale,
    )
