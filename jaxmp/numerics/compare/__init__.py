"""A function under policies, compared with itself in float32."""
