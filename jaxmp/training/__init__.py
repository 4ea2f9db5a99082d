"""`TrainState` and the policy beside a checkpoint. Imports Flax."""

from jaxmp.training._checkpoint_policy import check_checkpoint_policy, convert_like
from jaxmp.training._train_state import TrainState, restore

__all__ = ["TrainState", "restore", "check_checkpoint_policy", "convert_like"]
