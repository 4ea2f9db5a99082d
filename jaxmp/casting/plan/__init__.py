"""Which value gets which dtype, and why."""
