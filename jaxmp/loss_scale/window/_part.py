"""The gradients of one part of a batch as a program, traced once for all parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp._jaxpr.execution import as_function
from jaxmp._jaxpr.meshes import with_batched_constraints
from jaxmp._jaxpr.readers import only_dtypes_read
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.errors import CollectiveInLoss, DataAxesError, JaxmpError
from jaxmp.loss_scale.window import _sums
from jaxmp.loss_scale.window._arguments import Arguments
from jaxmp.loss_scale.window._axes import Axes
from jaxmp.loss_scale.window._sums import Form, listed

Arrays = dict[int, Any]
"""Leaves of the arguments that are arrays, by their place."""


class Results(NamedTuple):
    """What a part returns; over devices, each array begins with an axis of them.

    Attributes:
      sums: the loss and the gradients, listed as `Part.form` says.
      aux: the auxiliary outputs.
      changed: what the loss function changed in nnx models, by leaf.
    """

    sums: list[Any]
    aux: Any
    changed: Arrays


class Part(NamedTuple):
    """A traced function of one micro-batch.

    Attributes:
      call: function of the arrays that all parts take whole, and of those that are
        cut, to `Results`.
      abstract: the types of the arrays in `Results`.
      form: of the loss and the gradients.
      dtypes_read: for each array that is taken whole, the one dtype that everything
        casts it to, or None.
    """

    call: Callable[[Arrays, Arrays], Results]
    abstract: Results
    form: Form
    dtypes_read: Arrays


def trace_part(
    value_and_grad: Callable[..., Any],
    arguments: Arguments,
    whole: Arrays,
    micro_batch: Arrays,
    axes: Axes | None,
) -> Part:
    """Traces the loss function and its gradients on one micro-batch.

    Args:
      value_and_grad: function that returns `((loss, aux), grads)`.
      arguments: all of its arguments.
      whole: arrays that every part takes as they are.
      micro_batch: the arrays of one micro-batch; with `axes`, each begins with an axis
        of devices, over which the function is mapped.
      axes: of the mesh, or None.

    Raises:
      CollectiveInLoss: if the loss function reduces over the devices of `axes` itself.
    """
    known: dict[str, Any] = {}

    def one(whole: Arrays, micro_batch: Arrays) -> Results:
        here = {**whole, **micro_batch}
        leaves = [here.get(i, x) for i, x in enumerate(arguments.leaves)]
        copy = arguments.copy(leaves)
        (loss, aux), grads = value_and_grad(*copy.args, **copy.kwargs)
        sums, known["form"] = listed((loss, grads))
        return Results(sums, aux, arguments.changes(copy, leaves))

    def on_one_device(whole: Arrays, micro_batch: Arrays) -> Results:
        traced, form = jax.make_jaxpr(one, return_shape=True)(whole, micro_batch)
        opened = open_jaxpr(traced)
        places = [*sorted(whole), *sorted(micro_batch)]  # the order of their leaves
        inputs = dict(zip(places, opened.invars, strict=True))
        read = only_dtypes_read(traced, [inputs[i] for i in whole])
        known["read"] = dict(zip(whole, read, strict=True))
        made = jax.tree.unflatten(jax.tree.structure(form), opened.outvars)
        unchanged = [i for i, v in made.changed.items() if v is inputs.get(i)]
        run = traced if axes is None else with_batched_constraints(traced, axes.names)
        outs = as_function(run)(*jax.tree.leaves((whole, micro_batch)))
        results = jax.tree.unflatten(jax.tree.structure(form), outs)
        changed = {i: x for i, x in results.changed.items() if i not in unchanged}
        return results._replace(changed=changed)

    mapped = on_one_device
    if axes is not None:
        mapped = jax.vmap(on_one_device, in_axes=(None, 0), spmd_axis_name=axes.names)
    try:
        traced, shapes = jax.make_jaxpr(mapped, return_shape=True)(whole, micro_batch)
    except (NameError, ValueError) as error:
        explained = None if axes is None else _explained(error, axes)
        if explained is None:
            raise
        raise explained from error
    outs = [v.aval for v in open_jaxpr(traced).outvars]
    structure = jax.tree.structure(shapes)

    def call(whole: Arrays, micro_batch: Arrays) -> Results:
        outs = as_function(traced)(*jax.tree.leaves((whole, micro_batch)))
        return jax.tree.unflatten(structure, outs)

    abstract = jax.tree.unflatten(structure, outs)
    return Part(call, abstract, known["form"], known["read"])


def first_of(cut: Arrays) -> Arrays:
    """The first micro-batch."""
    return {i: x[0] for i, x in cut.items()}


def run_parts(
    part: Part,
    weights: Callable[[], Arrays],
    cut: Arrays,
    count: int,
    axes: Axes | None,
) -> Results:
    """Goes through the micro-batches, and adds up losses and gradients.

    Args:
      part: the program of one.
      weights: makes the arrays that each takes whole; called in the loop.
      cut: the others, with a first axis of micro-batches.
      count: of micro-batches.
      axes: over which each micro-batch lies, or None.

    Returns:
      Sums in float32 at least; with `axes`, one for each device. The rest has a first
      axis of parts, in the order in which they were cut.
    """

    def step(totals: list[Any], micro_batch: Arrays) -> tuple[list[Any], Results]:
        results = part.call(weights(), micro_batch)
        sums = _sums.add(totals, results.sums, part.form.summed)
        if axes is not None:
            sums = list(map(axes.spread, sums))
        return sums, results._replace(sums=[])

    def zeros(x: Any) -> jax.Array:
        dtype = _sums.total_dtype(x)
        return jnp.zeros(x.shape, dtype) if axes is None else axes.zeros(x, dtype)

    begin = list(map(zeros, part.abstract.sums))
    if count == 1:
        sums, others = step(begin, first_of(cut))
        others = jax.tree.map(lambda x: x[None], others)
    else:
        sums, others = jax.lax.scan(step, begin, cut, length=count)
    if axes is not None:
        others = jax.tree.map(_in_order, others)
    return others._replace(sums=sums)


def _in_order(x: jax.Array) -> jax.Array:
    """Brings `[micro-batches, devices, ...]` to `[parts, ...]`, device by device."""
    count, devices, *rest = x.shape
    return x.swapaxes(0, 1).reshape(devices * count, *rest)


def _explained(error: Exception, axes: Axes) -> JaxmpError | None:
    """What JAX's complaint means under `data_axes`, None if it is about something else.

    The words of JAX's messages are those of releases 0.10 to 0.12.
    """
    words = str(error)
    if "should match the aval mesh" in words:
        return DataAxesError(
            "The loss function closes over an array whose type shows "
            f"{list(axes.names)}: {words} Pass the array to it as an argument."
        )
    about_mapping = ("unbound axis name", "spmd_axis_name", "vmapped away", "shard_map")
    if not any(part in words for part in about_mapping):
        return None
    return CollectiveInLoss(
        f"The loss function works along {list(axes.names)} itself: {words} It gets the "
        "examples of one device alone. Leave psum, pmean and shard_map over these axes "
        "out of it: the average over devices is taken afterwards, once. Or leave "
        "data_axes out."
    )
