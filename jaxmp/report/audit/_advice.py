"""What an audit advises, which depends on what of jaxmp's is in use already."""

from jaxmp._jaxpr.calls import LOOPS
from jaxmp._jaxpr.scopes import layer_path
from jaxmp._jaxpr.sums import SCATTER
from jaxmp.report.audit.records import Accumulation, Matmul


def matmul_repair(matmul: Matmul, half: str, has_policy: bool) -> str:
    """What to do about a matmul that is not in half.

    Args:
      matmul: the matmul.
      half: the dtype that it is meant for.
      has_policy: whether another matmul of the program is under `apply_policy`.
    """
    if matmul.under == "full_precision":
        return (
            "jaxmp.full_precision keeps it as it is. If this is not on purpose, take "
            "the line out of it."
        )
    if matmul.under == "autocast":
        return (
            "jaxmp.autocast, which jaxmp.apply_policy also uses for your own layers, "
            "has left it as it is, because a rule, a precision= or a cast in the "
            "program asks for that; jaxmp.explain(plain_fn, policy)(*args) says which."
        )
    if matmul.under == "apply_policy":
        return _under_a_policy(matmul, half)
    if has_policy:
        return (
            "It is outside the module that jaxmp.apply_policy was put on. If this is "
            f"not on purpose, cast both operands to {half}, or put jaxmp.autocast "
            "around the whole function."
        )
    return (
        f"If this is not on purpose, cast both operands to {half}, or use "
        "jaxmp.apply_policy or jaxmp.autocast."
    )


def _under_a_policy(matmul: Matmul, half: str) -> str:
    path = layer_path(matmul.path.split("/"))
    rule = f"jaxmp.PolicyRule(path={path!r}, compute={half!r})"
    if matmul.library == "flax":
        how = f": rules=[{rule}]" if path else ""
        return (
            "A rule of jaxmp.apply_policy, or the layer's own dtype=, keeps it as it "
            "is; jaxmp.describe(model, policy, *args) says which. If this is not on "
            f"purpose, give apply_policy a rule for it{how}."
        )
    return (
        "jaxmp.apply_policy has cast the inputs of this module, and the code here "
        "computes in float32 nevertheless: a cast or a float32 constant comes before "
        f"it. If this is not on purpose, cast both operands to {half}."
    )


def sum_repair(found: Accumulation) -> str:
    """How to sum in float32, in the words of the program."""
    repair = _wide_sum(found)
    if found.under == "autocast":
        return (
            f"{repair} Under jaxmp.autocast, which sees float32 here already, mark it: "
            "jaxmp.full_precision(f)(x)."
        )
    return repair


def _wide_sum(found: Accumulation) -> str:
    if found.is_backward and found.operation != "cumsum":
        return (
            "It is the gradient of a value that is used many times. Keep that value in "
            "float32 and cast what is made of it, as in table[rows].astype(x.dtype); "
            "jaxmp.autocast sums the gradients of float32 weights in float32."
        )
    if found.operation in LOOPS:
        return (
            "Carry it in float32: start with jnp.zeros(shape, jnp.float32), and cast "
            "the result."
        )
    if found.operation == "add":
        return "Add in float32, and cast the result."
    if found.operation == SCATTER:
        return (
            "Add to a float32 array: jnp.zeros(shape, jnp.float32).at[i].add(x), or "
            "jax.ops.segment_sum(x.astype(jnp.float32), ids), and cast the result."
        )
    if found.operation == "cumsum":
        return "Sum in float32: jnp.cumsum(x, dtype=jnp.float32)."
    if found.operation == "reduce_sum":
        return "Sum in float32: jnp.sum(x, dtype=jnp.float32)."
    return "Sum in float32: f(x.astype(jnp.float32)), and cast the result."
