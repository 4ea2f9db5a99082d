"""What a plan consists of: a state for each value, a decision for each equation."""
