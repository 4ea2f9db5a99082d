"""The first stage of `compare`: the function in float32, every activation kept."""

import collections
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._jaxpr.primitives import CAST, LAYOUT, SCALED_DOT
from jaxmp._jaxpr.types import Array, Arrays
from jaxmp.errors import NumericsError
from jaxmp.numerics.compare._candidates import Read
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._site import ReplaySite

_REFERENCES = ("float32", "float64")
Key: TypeAlias = tuple[Any, ...]


class Reference(NamedTuple):
    """What the function computes in float32 or float64.

    Attributes:
      activations: every one, with the place that it was computed in, by `key_of`.
      outputs: of the function.
      gradients: by parameter; empty without a loss.
    """

    activations: dict[Key, list[tuple[ReplaySite, Array]]]
    outputs: list[Array]
    gradients: dict[str, Array]


def run_reference(read: Read) -> Reference:
    """Runs the function as it is, and with its gradient if it returns a loss."""
    run = _Remembering()
    outputs = run.run_program(read(backward=False))
    program = read()
    if program.loss_scale is None:
        return Reference(run.found, outputs, {})
    gradients = program.gradients(Interpreter().run_program(program))
    return Reference(run.found, outputs, gradients)


def key_of(site: ReplaySite, iterations: tuple[int, ...]) -> Key:
    """Identifies an operation, here and under a policy."""
    name = "dot_general" if site.primitive == SCALED_DOT else site.primitive
    return name, site.path, site.line, iterations


def is_activation(site: ReplaySite, results: Arrays) -> bool:
    """Whether an operation computes something that can be compared."""
    is_floating = bool(results) and _tree.is_inexact(results[0])
    return is_floating and site.primitive not in (*LAYOUT, CAST)


class _Remembering(Interpreter):
    def __init__(self):
        super().__init__()
        self.found: dict[Key, list[tuple[ReplaySite, Array]]]
        self.found = collections.defaultdict(list)

    def observe(self, site: ReplaySite, operands: Arrays, results: Arrays) -> None:
        if is_activation(site, results):
            self.found[key_of(site, self.iterations)].append((site, results[0]))


def widened(tree: Any, reference: str) -> Any:
    """Casts the floating arrays of a tree to the dtype of the reference.

    float8 arrays, which have no arithmetic, stay as they are.

    Raises:
      NumericsError: if `reference` is not supported, or needs x64.
    """
    if reference not in _REFERENCES:
        raise NumericsError(
            f"reference={reference!r} is not supported. Write reference='float32', or "
            "'float64' while x64 is enabled."
        )
    if reference == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore
        raise NumericsError(
            "reference='float64' needs 64-bit arrays, which JAX has turned off. Write "
            "jax.config.update('jax_enable_x64', True), or with jax.enable_x64(True)."
        )

    def widen(x: Any) -> Any:
        if not _tree.is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.asarray(x, reference) if x.dtype.itemsize > 1 else x

    return jax.tree.map(widen, tree)
