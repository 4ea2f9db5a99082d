"""How far apart two trees of arrays are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def norm(tree: Any) -> float:
    """The Euclidean norm of all floating arrays of a tree, in float64."""
    floating = [
        np.linalg.norm(np.asarray(x, np.float64))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return float(np.linalg.norm(floating))


def distance(x: Any, y: Any) -> float:
    """The Euclidean distance of two arrays, in float64."""
    return float(np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64)))
