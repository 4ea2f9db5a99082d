"""What jaxmp's Optax transformations share: states, order and rounding."""
