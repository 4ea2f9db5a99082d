"""Which values are sums, whose rounding would lose what is added."""
