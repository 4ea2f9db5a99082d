"""`TrainState` and checkpoints. Imports Flax, and Orbax only for `Checkpoints`."""

from typing import TYPE_CHECKING, Any

from jaxmp.training._checkpoint_policy import convert_like
from jaxmp.training._restored import adopt, check_restored
from jaxmp.training._train_state import TrainState, restore

if TYPE_CHECKING:
    from jaxmp.training._orbax import Checkpoints

__all__ = [
    "TrainState",
    "restore",
    "adopt",
    "check_restored",
    "Checkpoints",
    "convert_like",
]


def __getattr__(name: str) -> Any:
    # Orbax is an extra, and takes as long to import as JAX.
    if name == "Checkpoints":
        from jaxmp.training._orbax import Checkpoints

        return Checkpoints
    raise AttributeError(f"module 'jaxmp.training' has no attribute {name!r}")
