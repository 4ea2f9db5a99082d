"""Where the first NaN or infinity comes from, and what mends it."""
