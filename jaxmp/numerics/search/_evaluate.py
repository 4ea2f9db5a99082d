"""How far a set of float32 units leaves loss and gradients off, saved as it is found.

kept units  ->  rules  ->  autocast(loss_fn, policy, rules)  ->  loss, gradients
                                                             ->  distance to float32
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.atoms import is_half
from jaxmp._jaxpr.flops import matmul_shape
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp._jaxpr.types import Jaxpr
from jaxmp._jaxpr.walk import counted
from jaxmp.errors import SearchStateMismatch
from jaxmp.numerics.compare._distance import Distance, share_least
from jaxmp.numerics.replay._interpreter import CompiledLoops
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


class Measured:
    """Loss and gradients of one batch.

    Attributes:
      loss: the loss.
      gradients: unscaled, in float64.
    """

    def __init__(self, program: Program):
        outs = CompiledLoops().run_program(program)
        assert program.loss_index is not None
        self.loss = float(outs[program.loss_index])
        self.gradients = [
            np.asarray(x).astype(np.float64) / program.used_scale
            for x in program.gradients(outs).values()
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


def half_flops(jaxpr: Jaxpr) -> float:
    """Share of the matmul FLOPs of a program that run in half."""
    half = total = 0
    for eqn, times in counted(jaxpr):
        if eqn.primitive.name in MATMULS:
            flops = times * matmul_shape(eqn).flops
            total += flops
            half += flops * is_half(eqn.invars[0])
    return half / total if total else 0.0


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
