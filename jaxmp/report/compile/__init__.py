"""A step on its way through the compilers of other machines."""
