"""The range of every value that a function computes."""
