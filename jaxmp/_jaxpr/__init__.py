"""The ground floor: the only place that knows how JAX and Flax are made."""
