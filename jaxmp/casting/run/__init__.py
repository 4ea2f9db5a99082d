"""A plan, run: every equation bound again in its dtypes."""
