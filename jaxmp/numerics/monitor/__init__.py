"""Statistics of a training run, kept in the optimizer's state."""
