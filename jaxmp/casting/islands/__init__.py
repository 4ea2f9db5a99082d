"""Float32 operations that hand values to each other, and run together."""
