"""The step that a command looks at: one that a function makes, or one of a model."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxmp.cli._load import load_function, make_step, names_of, takes_policy
from jaxmp.cli._models import is_model, make_model_step
from jaxmp.errors import InvalidStep
from jaxmp.report.compile.progress import Progress


class Target(NamedTuple):
    """A training step, for every policy.

    Attributes:
      make: takes a policy, or nothing, and returns `(step, *args)`.
      takes_policy: whether the policy has an effect on what `make` returns.
      is_model: whether the step was made for a model.
    """

    make: Callable[..., tuple[Any, ...]]
    takes_policy: bool
    is_model: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a step."""
    parser.add_argument(
        "step",
        metavar="TARGET",
        help="MODULE:NAME or FILE.py:NAME. With --inputs: a model, that is a class of "
        "Flax linen, of nnx or of Hugging Face's Flax models, or a function whose "
        "first argument is differentiated. Without: a function that takes a policy, "
        "or nothing, and returns (step, *args): arrays or jax.ShapeDtypeStructs will "
        "do",
    )
    parser.add_argument(
        "--inputs",
        metavar="ARGS",
        help="what a model is called with: dtypes and shapes, and Python values, as in "
        "'i32[8,128], train=False'",
    )
    parser.add_argument(
        "--config",
        metavar="ARGS",
        help="what a model is made of, as in 'n_layer=2, n_head=4': arguments of its "
        "class, or settings of its Hugging Face config (the defaults)",
    )


def load_target(options: argparse.Namespace, progress: Progress) -> Target:
    """Imports what the options name, and makes its step.

    Raises:
      InvalidStep: if there is no such thing, or it cannot be made or called.
    """
    progress.say(f"loading {options.step}")
    function = load_function(options.step)
    name = options.step.rpartition(":")[2]
    if options.inputs is None:
        if options.config is not None or is_model(function):
            what = "a model" if is_model(function) else "to be made of --config"
            raise InvalidStep(
                f"{options.step} is {what}: say what it is called with, such as "
                "--inputs 'i32[8,128]'."
            )
        if takes_policy(function):
            return Target(lambda policy: make_step(function, policy), True)
        return Target(lambda: make_step(function), False)
    progress.say(f"making {name}, without its weights")
    make = make_model_step(
        function, name, options.config or "", options.inputs, names_of(options.step)
    )
    return Target(make, True, is_model=True)
