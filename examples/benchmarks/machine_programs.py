"""What is timed on a real machine: training steps, and AdamW's update alone."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ways
from compiled_steps import FLOAT32, IN_HALF, abstract_arguments
from models import JOBS, TINY_JOBS, Job

import jaxmp

UPDATE = "update step"
MODELS = ("GPT-2 small", "ResNet-50", "BERT-Base", "Transformer-XL base")
WAYS: dict[str, Callable[[Job], ways.Training]] = {FLOAT32: ways.plain, **IN_HALF}
FIRST_MODELS, FIRST_WAYS = MODELS[:2], ("by hand", "autocast", "apply_policy")


class Program(NamedTuple):
    """A step, what it takes, and what it starts with.

    Attributes:
      step: `(state, batch)` to the next state and the loss, or None without a loss.
      arguments: the shapes of a state and a batch.
      start: makes them, on JAX's default device.
      shape: the batch and the optimizer in words.
    """

    step: Callable[[Any, Any], tuple[Any, Any]]
    arguments: tuple[Any, Any]
    start: Callable[[], tuple[Any, Any]]
    shape: str


class Case(NamedTuple):
    """One program by its names: a model and a way, or `UPDATE` and an optimizer."""

    model: str
    way: str


def program(case: Case, *, tiny: bool = False) -> Program:
    jobs = TINY_JOBS if tiny else JOBS
    if case.model == UPDATE:
        return update_program(case.way, jobs["GPT-2 small"])
    return training_program(WAYS[case.way], jobs[case.model])


def cases(models: Iterable[str] = (), names: Iterable[str] = ()) -> list[Case]:
    """What is timed, the most important first: a run may end before the last.

    Args:
      models: these only, `UPDATE` among them; all if empty.
      names: these ways and updates only; all if empty.
    """
    models, names = list(models), list(names)
    first = [
        Case(model, f"bfloat16 {way}") for model in FIRST_MODELS for way in FIRST_WAYS
    ]
    steps = [
        Case(model, way)
        for dtype in (FLOAT32, "bfloat16", "float16")
        for model in MODELS
        for way in WAYS
        if way.startswith(dtype)
    ]
    updates = [Case(UPDATE, name) for name in UPDATES]
    return [
        case
        for case in dict.fromkeys([*first, *steps, *updates])
        if case.model in (models or [case.model]) and case.way in (names or [case.way])
    ]


# Training steps


def training_program(way: Callable[[Job], ways.Training], job: Job) -> Program:
    training = way(job)

    def start() -> tuple[Any, Any]:
        key = jax.random.key(0)
        batch = jax.jit(job.batch)(key)
        inputs, _ = batch
        shapes = jax.eval_shape(job.model().init, key, *inputs)
        state = jax.jit(training.init)(key, like_first_values(shapes))
        return state, batch

    return Program(training.step, abstract_arguments(training, job), start, job.shape)


def like_first_values(shapes: Any) -> Any:
    """Variables as a model starts with: norms of 1, small weights, the rest 0.

    Flax makes its own by a random kernel for each array. Compilers take as long for
    these as for the training step, and what a step takes does not depend on values.
    """
    random = np.random.default_rng(0)

    def value(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [str(getattr(key, "key", key)) for key in path]
        if names[-1] in ("scale", "var"):
            return np.ones(leaf.shape, leaf.dtype)
        if names[0] != "params" or leaf.ndim < 2:
            return np.zeros(leaf.shape, leaf.dtype)
        values = random.standard_normal(leaf.shape, np.float32)
        inputs = leaf.size // leaf.shape[-1]
        return (values / np.sqrt(inputs)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


# The update alone


def clipped() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def rounded() -> optax.GradientTransformation:
    return jaxmp.stochastic_rounding(clipped(), seed=0)


def mastered() -> optax.GradientTransformation:
    return jaxmp.master_weights(clipped())


CLIP = "clip + adamw"
UPDATES: dict[str, tuple[str, Callable[[], optax.GradientTransformation]]] = {
    CLIP: ("float32", clipped),
    "loss_scaling": (
        "float32",
        lambda: jaxmp.loss_scaling(clipped(), "mixed_float16"),
    ),
    "optax.apply_if_finite": (
        "float32",
        lambda: optax.apply_if_finite(clipped(), max_consecutive_errors=5),
    ),
    "master_weights": ("bfloat16", mastered),
    "loss_scaling(master_weights)": (
        "bfloat16",
        lambda: jaxmp.loss_scaling(mastered(), "bfloat16"),
    ),
    "stochastic_rounding": ("bfloat16", rounded),
    "loss_scaling(stochastic_rounding)": (
        "bfloat16",
        lambda: jaxmp.loss_scaling(rounded(), "bfloat16"),
    ),
}
"""The dtype of parameters and gradients, and what wraps the clip and AdamW."""


def update_program(name: str, job: Job) -> Program:
    """An update of the parameters of a model, which nothing differentiates."""
    dtype, make = UPDATES[name]
    tx = make()

    def step(state: Any, grads: Any) -> tuple[Any, None]:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    key = jax.eval_shape(lambda: jax.random.key(0))
    full = jax.eval_shape(ways.plain(job).init, key).params
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), full
    )
    count = sum(x.size for x in jax.tree.leaves(params))

    def start() -> tuple[Any, Any]:
        values = like_first_values({"params": params})["params"]
        first = jax.device_put((values, values), jax.devices("cpu")[0])
        init = jax.jit(lambda params: (params, tx.init(params)))
        return init(first[0]), first[1]

    arguments = (params, jax.eval_shape(tx.init, params)), params
    return Program(step, arguments, start, f"{count / 1e6:.1f} M parameters in {dtype}")
