"""Float8 and int8 matmuls: recipes, scales, the matmul and its two gradients."""
