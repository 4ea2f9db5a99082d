"""Training steps for several devices: how they are written, laid out and cast."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from models.transformers import SMALL, WRITTEN, Model, Sizes

import jaxmp
from jaxmp.sharding import state_shardings

DEVICES = 8
BATCH, LENGTH = 32, 256
HALF = jnp.bfloat16


class Layout(NamedTuple):
    """How weights lie over the devices.

    Attributes:
      mesh: sizes of its axes, by name.
      weights: whether weights are divided.
      state: whether the optimizer's state is, though the weights are whole.
    """

    mesh: dict[str, int]
    weights: bool = True
    state: bool = False


LAYOUTS = {
    "FSDP": Layout({"data": DEVICES}),
    "data parallel": Layout({"data": DEVICES}, weights=False),
    "FSDP + TP": Layout({"data": DEVICES // 2, "model": 2}),
    "ZeRO-1": Layout({"data": DEVICES}, weights=False, state=True),
}


class Case(NamedTuple):
    """A training step on eight devices.

    Attributes:
      layout: a key of `LAYOUTS`.
      written: a key of `WRITTEN`.
      way: `"by hand"`, `"apply_policy"` or `"autocast"`.
      reduce: the dtype in which gradients are summed, as the user says it.
      micro_batches: how many, None for the whole batch.
      data_axes: whether there is one reduction for all micro-batches.
      gather: how often weights are gathered then.
      sizes: of the model.
      batch: sequences in a batch.
    """

    layout: str
    written: str
    way: str
    reduce: str | None = None
    micro_batches: int | None = None
    data_axes: bool = False
    gather: str | None = None
    sizes: Sizes = SMALL
    batch: int = BATCH

    @property
    def model(self) -> str:
        """What the model is called."""
        name = "tied" if self.sizes.tied else "small"
        marks = [m for m in ("scan", "remat") if getattr(self.sizes, m)]
        return ", ".join([name, *marks])

    @property
    def policy(self) -> str:
        reduce = self.reduce and not self.data_axes
        return "mixed_bfloat16" + (f",reduce={self.reduce}" if reduce else "")

    @property
    def window(self) -> str:
        """The batch and how it is cut, in words, unless it is the usual one."""
        if self.micro_batches is None:
            return "" if self.batch == BATCH else f"{self.batch} x {LENGTH}"
        cut = f"{self.micro_batches} micro-batches"
        if not self.data_axes:
            return cut
        return f"{cut}, data_axes" + (f", gather={self.gather}" if self.gather else "")

    def __str__(self) -> str:
        parts = (self.model, self.layout, self.written, self.way, self.reduce)
        return ", ".join(filter(None, (*parts, self.window)))


def mesh_of(layout: Layout) -> AbstractMesh:
    """The mesh of a layout, without devices."""
    names = tuple(layout.mesh)
    kinds = (AxisType.Auto,) * len(names)
    return AbstractMesh(tuple(layout.mesh.values()), names, axis_types=kinds)


def written_down(case: Case) -> Model:
    """The model of a case, with dtypes by hand, under a policy, or without either."""
    write: Callable[..., Model] = WRITTEN[case.written]
    sizes = case.sizes
    if sizes.scan:
        # XLA would rather divide the stream by columns, as the weights of a loop are.
        rows = NamedSharding(mesh_of(LAYOUTS[case.layout]), PartitionSpec("data"))
        sizes = sizes._replace(place=rows)
    if case.way == "by hand":
        return write(sizes, HALF)
    if case.way == "apply_policy":
        under = functools.partial(jaxmp.apply_policy, policy=case.policy)
        return write(sizes, under=under)
    return write(sizes)


def loss_function(case: Case, model: Model) -> Callable[[Any, jax.Array], jax.Array]:
    """The mean cross-entropy of the next token."""

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply(params, tokens[:, :-1]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    if case.way == "autocast":
        return jaxmp.autocast(loss_fn, case.policy)
    return loss_fn


def shardings_of(case: Case, params: Any) -> Any:
    """How the weights lie: rows over data, and columns over `model` if there is one.

    As in Megatron, what leads back into the residual stream is divided the other way
    round, so that two matmuls need one sum of activations. A table, of which single
    rows are read, is divided by rows only.
    """
    layout = LAYOUTS[case.layout]
    mesh, names = mesh_of(layout), tuple(layout.mesh)

    def entries(parts: set[str], ndim: int) -> tuple[Any, ...]:
        if not layout.weights:
            return ()
        if "model" not in names:
            return ("data", None)[:ndim]
        if ndim == 1:
            return (None,)
        if "table" in parts:
            return (names, None)
        return ("model", "data") if {"o", "down"} & parts else ("data", "model")

    def sharding(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> NamedSharding:
        parts = set(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
        stacked = case.sizes.scan and "layers" in parts
        along = entries(parts, x.ndim - stacked)
        return NamedSharding(mesh, PartitionSpec(*[None] * stacked, *along))

    return jax.tree_util.tree_map_with_path(sharding, params)


def laid_out(tree: Any, shardings: Any) -> Any:
    """Shapes that lie as shardings say."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def gradients(case: Case, model: Model, shardings: Any) -> Callable[..., Any]:
    """`(params, tokens, loss_scale=)` to the loss and its gradients."""
    options: dict[str, Any] = {}
    if case.micro_batches:
        options["micro_batches"] = case.micro_batches
    if case.data_axes:
        options["data_axes"], options["reduce_dtype"] = "data", case.reduce
        options["mesh"] = jax.tree.leaves(shardings)[0].mesh
        options["grad_shardings"] = shardings
        options["gather"] = case.gather
    return jaxmp.value_and_grad(loss_function(case, model), **options)


def sharded_step(case: Case) -> tuple[Any, ...]:
    """A step, jitted, and the shapes of its weights, its state and its tokens."""
    model = written_down(case)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    params = model.params
    if case.layout == "ZeRO-1":
        tx = jaxmp.master_weights(tx)
        params = jaxmp.get_policy("bfloat16").cast_to_param(params)
    by_hand = case.way == "by hand"
    if not by_hand:
        tx = jaxmp.loss_scaling(tx, case.policy)
    shardings = shardings_of(case, params)
    mesh = jax.tree.leaves(shardings)[0].mesh
    if by_hand:
        value_and_grad = jax.value_and_grad(loss_function(case, model))
    else:
        value_and_grad = gradients(case, model, shardings)

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        scale = {} if by_hand else {"loss_scale": state}
        loss, grads = value_and_grad(params, tokens, **scale)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = jax.eval_shape(tx.init, params)
    over = "data" if LAYOUTS[case.layout].state else ()
    lie = shardings, state_shardings(state, params, shardings, over=over)
    everywhere = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*lie, everywhere))
    tokens = jax.ShapeDtypeStruct(
        (case.batch, LENGTH + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec("data")),
    )
    return jitted, *laid_out((params, state), lie), tokens
