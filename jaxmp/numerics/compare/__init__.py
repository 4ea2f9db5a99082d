"""A function under policies, held against itself in float32."""
