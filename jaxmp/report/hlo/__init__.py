"""What a compiled program says: matmuls, buffers, a roofline."""
