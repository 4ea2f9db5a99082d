"""What autocast knows of operations: the op lists, rules of users, half functions."""
