"""What jaxmp takes for granted of Flax beyond its public interface, by name."""

from jaxmp._jaxpr.sources import Written

CALL_WRAPPED_METHOD = "_call_wrapped_method"
"""The method of a linen module through which every call of a method goes."""

LINEN_MODULE = "flax.linen.module"
LINEN_TRANSFORMS = "flax.linen.transforms"
"""Where linen makes the classes of lifted modules, such as those of `nn.remat`."""

PROMOTE_DTYPE = "promote_dtype"
"""Flax's function that brings inputs and parameters to one dtype."""
PROMOTIONS = (PROMOTE_DTYPE, "qkv_promote_dtype")
"""The attributes in which nnx layers hold it."""

OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"
"""The collection of FP8 scales and histories, whose gradients are their new values
(flax/linen/fp8_ops.py)."""
FP8_VARIABLES = frozenset(
    f"{operand}_{kind}"
    for operand in ("input", "kernel", "output_grad")
    for kind in ("scale", "amax_history")
)
"""The variables of one FP8 operation in that collection."""


def is_flax_layer(cls: type) -> bool:
    """Whether Flax itself defines a layer class, in linen or nnx.

    Base classes do not count, nor do the classes that a lifted transformation makes of
    a user's class.
    """
    if cls.__module__ in (LINEN_MODULE, LINEN_TRANSFORMS):
        return False
    return cls.__module__.startswith(("flax.linen.", "flax.nnx.nn."))


def is_lifted(cls: type) -> bool:
    """Whether linen made a class to lift a module through a transformation."""
    return cls.__module__ == LINEN_TRANSFORMS


def promotes(how: Written) -> bool:
    """Whether Flax's promotion of inputs and parameters called JAX."""
    return how.library == "flax" and how.caller.startswith(PROMOTE_DTYPE)


def is_users(cls: type) -> bool:
    """Whether a class was written by neither Flax nor Python."""
    return not cls.__module__.startswith(("flax.", "builtins"))


def promotion_of(layer: object) -> str | None:
    """The attribute in which an nnx layer holds its promotion to one dtype."""
    return next((name for name in PROMOTIONS if hasattr(layer, name)), None)
