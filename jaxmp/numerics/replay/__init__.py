"""A program run operation by operation, for others to look at."""
