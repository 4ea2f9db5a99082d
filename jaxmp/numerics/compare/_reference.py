"""The first stage of `compare`: the function in float32, every activation kept."""

import collections
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxmp import _tree, _warnings
from jaxmp._jaxpr.matmuls import operands as operands_of
from jaxmp._jaxpr.primitives import ALL_MATMULS, CAST, LAYOUT, SCALED_DOT
from jaxmp._jaxpr.types import Array, Arrays
from jaxmp.errors import HalfReferenceWarning, NumericsError
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
    _warn_of_half(run.matmuls)
    program = read()
    if program.loss_scale is None:
        return Reference(run.found, outputs, {})
    gradients = program.gradients(Interpreter().run_program(program))
    return Reference(run.found, outputs, gradients)


def key_of(site: ReplaySite, result: Array, iterations: tuple[int, ...]) -> Key:
    """Identifies an operation, here and under a policy."""
    name = "dot_general" if site.primitive == SCALED_DOT else site.primitive
    return name, site.path, site.line, site.call, result.shape, iterations


def is_activation(site: ReplaySite, results: Arrays) -> bool:
    """Whether an operation computes something that can be compared."""
    is_floating = bool(results) and _tree.is_inexact(results[0])
    return is_floating and site.primitive not in (*LAYOUT, CAST)


class _Remembering(Interpreter):
    def __init__(self):
        super().__init__()
        self.found: dict[Key, list[tuple[ReplaySite, Array]]]
        self.found = collections.defaultdict(list)
        self.matmuls: dict[ReplaySite, None] = {}

    def observe(self, site: ReplaySite, operands: Arrays, results: Arrays) -> None:
        if site.primitive in ALL_MATMULS:
            self.matmuls[site] = None
        if is_activation(site, results):
            key = key_of(site, results[0], self.iterations)
            self.found[key].append((site, results[0]))


def _warn_of_half(matmuls: Iterable[ReplaySite]) -> None:
    """Warns if the function, which was to run in float32, multiplies in half."""
    dtypes = {site: _narrow_dtype(site) for site in matmuls}
    narrow = [site for site, dtype in dtypes.items() if dtype]
    if not narrow:
        return
    first = narrow[0]
    place = f", the first at {first.line.short}" if first.line else ""
    _warnings.warn(
        f"{len(narrow)} of {len(dtypes)} matmuls of the function itself multiply in "
        f"{dtypes[first]}{place}. There compare has no reference in float32, and "
        "finds each policy as good as what the function does by itself. Hand it the "
        "function in float32: a model before apply_policy, with dtype=None or float32 "
        "in its layers.",
        HalfReferenceWarning,
    )


def _narrow_dtype(site: ReplaySite) -> str:
    """The first dtype below float32 that a matmul multiplies, if there is one."""
    dtypes = [x.dtype for x in operands_of(site.eqn)]
    narrow = (x for x in dtypes if jnp.issubdtype(x, jnp.floating) and x.itemsize < 4)
    return next(map(str, narrow), "")


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
