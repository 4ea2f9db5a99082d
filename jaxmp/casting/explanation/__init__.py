"""What `explain` shows of a plan, and what keeps matmuls from half."""
