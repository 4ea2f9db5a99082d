"""Fused kernels, which are traced on half operands."""
