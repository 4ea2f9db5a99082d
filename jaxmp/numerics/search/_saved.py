"""`Saved`: the evaluations of a search, in a file from which it goes on."""

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
from jaxmp.errors import SearchStateMismatch
from jaxmp.numerics.search._evaluation import Evaluation


class Saved:
    """The evaluations of a search, in memory and, if asked for, in a file.

    Args:
      path: a JSON file that is read if it is there and written after each evaluation;
        None saves nothing.
      search: what the search is about; a file of another search is refused.
    """

    def __init__(self, path: str | os.PathLike[str] | None, search: dict[str, Any]):
        self.path = path
        self.search = search
        self.evaluations: dict[frozenset[str], Evaluation] = {}
        if path is not None and os.path.exists(path):
            self._read(path)

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

    def most_half_first(self) -> tuple[Evaluation, ...]:
        """Everything that was evaluated, by share of FLOPs in half."""

        def order(x: Evaluation) -> tuple[Any, ...]:
            return -x.half_flops, -x.quantized_flops, len(x.kept), x.kept

        return tuple(sorted(self.evaluations.values(), key=order))

    def _read(self, path: str | os.PathLike[str]) -> None:
        with open(path, encoding="utf-8") as file:
            try:
                saved = json.load(file)
                found = saved["search"]
                evaluations = [Evaluation(**row) for row in saved["evaluations"]]
            except (ValueError, KeyError, TypeError) as error:
                raise SearchStateMismatch(
                    f"{path} does not hold a search of search_policy "
                    f"({type(error).__name__}: {error}). Name another file as resume=."
                ) from error
        if found != self.search:
            names = sorted(
                name for name in self.search if found.get(name) != self.search[name]
            )
            raise SearchStateMismatch(
                f"{path} holds another search: {', '.join(names)} differ. Name "
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
