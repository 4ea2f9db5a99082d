"""Which matmuls are multiplied in float8 or int8."""
