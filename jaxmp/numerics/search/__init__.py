"""The fewest layers and operations that have to stay in float32."""
