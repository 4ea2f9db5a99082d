"""How far a set of float32 units leaves loss and gradients off, saved as it is found.

kept units  ->  rules  ->  autocast(loss_fn, policy, rules)  ->  loss, gradients
                                                             ->  distance to float32
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.flops import matmul_shape
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.errors import SearchStateMismatch
from jaxmp.numerics.compare._distance import Distance, share_least
from jaxmp.numerics.compare._scales import used_scale
from jaxmp.numerics.nonfinite._provenance import jit_exactly
from jaxmp.numerics.replay._interpreter import Interpreter, bind
from jaxmp.numerics.replay._program import Program


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one set of units costs and gives.

    Attributes:
      kept: names of the units that compute in float32.
      loss_error: relative error of the loss, of the worst batch.
      gradient_error: relative error of the gradient of the worst parameter.
      half_flops: share of the matmul FLOPs, backward included, that run in half.
    """

    kept: tuple[str, ...]
    loss_error: float
    gradient_error: float
    half_flops: float

    @property
    def error(self) -> float:
        """The larger of the two errors."""
        return max(self.loss_error, self.gradient_error)


class CompiledLoops(Interpreter):
    """Runs operation by operation, and loops as one."""

    def __init__(self):
        super().__init__()
        self._loops: dict[int, Callable[..., list[Any]]] = {}

    def loop(self, site, operands):
        eqn = site.eqn
        if id(eqn) not in self._loops:
            self._loops[id(eqn)] = jit_exactly(lambda *values: bind(eqn, values))
        return self._loops[id(eqn)](*operands)


class Measured:
    """Loss and gradients of one batch.

    Attributes:
      loss: the loss.
      gradients: unscaled, in float64.
    """

    def __init__(self, program: Program):
        scale = used_scale(program)
        outs = CompiledLoops().run_program(program)
        kinds = [output.kind for output in program.outputs]
        wide = [np.asarray(x).astype(np.float64) for x in outs]
        self.loss = float(wide[kinds.index("loss")])
        self.gradients = [
            x / scale for x, kind in zip(wide, kinds, strict=True) if kind == "gradient"
        ]

    @property
    def is_finite(self) -> bool:
        """Whether everything is."""
        return all(np.isfinite(x).all() for x in (self.loss, *self.gradients))

    def distances(self, reference: "Measured") -> tuple[float, float]:
        """Relative errors of the loss and of the worst gradient."""
        loss = Distance()
        loss.add(np.float64(reference.loss), np.float64(self.loss))
        gradients = []
        for wanted, x in zip(reference.gradients, self.gradients, strict=True):
            gradients.append(Distance())
            gradients[-1].add(wanted, x)
        share_least(gradients)
        worst = max((x.relative_error for x in gradients), default=0.0)
        return loss.relative_error, worst


def half_flops(jaxpr: Any) -> float:
    """Share of the matmul FLOPs of a program that run in half."""
    half, total = _flops(jaxpr)
    return half / total if total else 0.0


def _flops(jaxpr: Any) -> tuple[float, float]:
    half = total = 0.0
    for eqn in open_jaxpr(jaxpr).eqns:
        if eqn.primitive.name in MATMULS:
            flops = matmul_shape(eqn).flops
            total += flops
            half += flops * (eqn.invars[0].aval.dtype in _tree.HALF)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner, "eqns"):
                    inner_half, inner_total = _flops(inner)
                    half += times * inner_half
                    total += times * inner_total
    return half, total


class Saved:
    """The evaluations of a search, in memory and, if asked for, in a file.

    Args:
      path: a JSON file that is read if it is there and written after each evaluation;
        None saves nothing.
      search: what the search is about; a file of another search is refused.
    """

    def __init__(self, path: Any, search: dict[str, Any]):
        self.path = path
        self.search = search
        self.evaluations: dict[frozenset[str], Evaluation] = {}
        if path is not None and os.path.exists(path):
            self._read()

    def add(self, evaluation: Evaluation) -> None:
        """Remembers an evaluation."""
        self.evaluations[frozenset(evaluation.kept)] = evaluation
        if self.path is not None:
            rows = [dataclasses.asdict(x) for x in self.evaluations.values()]
            text = json.dumps({"search": self.search, "evaluations": rows}, indent=1)
            # A search that is stopped while it writes leaves the file as it was.
            beside = f"{os.fspath(self.path)}.part"
            with open(beside, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(beside, self.path)

    def _read(self) -> None:
        with open(self.path, encoding="utf-8") as file:
            try:
                saved = json.load(file)
                found = saved["search"]
                evaluations = [Evaluation(**row) for row in saved["evaluations"]]
            except (ValueError, KeyError, TypeError) as error:
                raise SearchStateMismatch(
                    f"{self.path} holds no search of search_policy "
                    f"({type(error).__name__}: {error}). Name another file as resume=."
                ) from error
        if found != self.search:
            names = sorted(
                name for name in self.search if found.get(name) != self.search[name]
            )
            raise SearchStateMismatch(
                f"{self.path} holds another search: {', '.join(names)} differ. Name "
                "another file as resume=, or delete this one."
            )
        for x in evaluations:
            x = dataclasses.replace(x, kept=tuple(x.kept))
            self.evaluations[frozenset(x.kept)] = x


def digest(batches: Sequence[Any]) -> str:
    """A short name for the values of arrays."""
    found = hashlib.sha256()
    for x in jax.tree.leaves(batches):
        if _tree.is_array(x) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            found.update(f"{x.dtype}{x.shape}".encode())
            found.update(np.asarray(x).tobytes())
    return found.hexdigest()[:16]
