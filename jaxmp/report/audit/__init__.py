"""The dtypes of a program, read from its jaxpr."""
