"""How a plan is made: what is wanted in half, what users decided, what follows."""
