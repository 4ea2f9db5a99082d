"""`apply_policy`: takes a Flax module, and returns the same module under a policy."""

from typing import Any, Literal, TypeVar

import flax.linen as nn
from flax import nnx

from jaxmp.errors import InvalidOption, NotAModule
from jaxmp.modules._layers import Application
from jaxmp.modules._linen import apply_to_linen
from jaxmp.modules._nnx import apply_to_nnx
from jaxmp.policy import PolicyLike, default_rules, get_policy
from jaxmp.policy.rule_sets import check_rules

M = TypeVar("M")


def apply_policy(
    module: M,
    policy: PolicyLike,
    *,
    rules: Any = default_rules,
    explicit_dtype: Literal["override", "keep"] | None = None,
    own_code: Literal["autocast", "half"] = "autocast",
    named_scopes: bool = True,
) -> M:
    """Makes a Flax module, linen or nnx, store, compute and return a policy's dtypes.

    Parameters are stored in the policy's `param_dtype`. Flax's own layers compute as if
    `dtype=` had been written into the model: matmuls and convolutions in the compute
    dtype, attention with a float32 softmax, embeddings looked up in the stored table.
    The code of the user's own layers is planned operation by operation, as `autocast`
    plans it: matmuls in half; sums, norms, probabilities and losses in float32. The
    module returns the output dtype. Variables other than parameters, such as BatchNorm
    statistics, keep their dtype.

    Many models hand a `dtype` down to their layers, in a float32 field such as
    `dtype: Any = jnp.float32`, alone or in a config. Such a field gets the policy's
    dtype, in the module and in every layer inside. A layer that still asks for another
    dtype after that keeps it.

    Args:
      module: a linen module, bound or not, or an nnx module, which may be abstract.
      policy: what `get_policy` takes.
      rules: a sequence of `PolicyRule`, tried in order. The default rules, which keep
        norms in float32, come after them; `rules=()` leaves them out.
      explicit_dtype: `"override"` gives every layer the policy's dtype, whatever its
        author wrote. `"keep"` hands nothing down and keeps every `dtype` that is
        written. None keeps only those that were not handed down.
      own_code: `"autocast"` plans the code of the user's layers. `"half"` only casts
        their inputs and parameters to half: everything then runs in half, sums
        included.
      named_scopes: whether to name Flax's layers by kind and compute dtype in HLO dumps
        and profiles, as in `jaxmp/dense/bfloat16` or `jaxmp/norm/float32`.

    Returns:
      A module of the same kind, with the same parameter paths. The given one is not
      changed. If policies are applied twice, the outer one holds.

    Raises:
      NotAModule: for a class, variables, or anything but a Flax module.
      PolicyError: for a policy that cannot be read.
      InvalidRule: for rules that cannot be read.
      UnusedRule: for a rule that matches no layer: at once for nnx, on a call of the
        whole module for linen.
      PolicyWithoutEffect: for a half policy that leaves every matmul in float32: at
        once for nnx if all layers are kept, else on a call of the whole module.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxmp
      >>> model = jaxmp.apply_policy(nn.Dense(2), "mixed_bfloat16")
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> variables["params"]["kernel"].dtype, model.apply(variables, jnp.ones(3)).dtype
      (dtype('float32'), dtype('float32'))
    """
    _check_option("explicit_dtype", explicit_dtype, ("override", "keep", None))
    _check_option("own_code", own_code, ("autocast", "half"))
    application = Application(
        get_policy(policy), check_rules(rules), named_scopes, explicit_dtype, own_code
    )
    if isinstance(module, nn.Module):
        return apply_to_linen(module, application)
    if isinstance(module, nnx.Module):
        return apply_to_nnx(module, application)
    raise NotAModule(_not_a_module(module))


def _check_option(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise InvalidOption(
            f"{name}={value!r} is not an option of apply_policy(). Write one of: "
            f"{', '.join(map(repr, allowed))}."
        )


def _not_a_module(module: Any) -> str:
    inner = getattr(module, "module", None)
    if isinstance(inner, nn.Module):
        name = type(module).__name__
        return (
            f"A {name} is not a module itself, but it has one. Write "
            "module = apply_policy(model.module, policy), and call "
            "module.apply({'params': model.params}, ...)."
        )
    if isinstance(module, type) and issubclass(module, (nn.Module, nnx.Module)):
        return (
            f"{module.__name__} is a class, and apply_policy() takes an instance: "
            f"apply_policy({module.__name__}(...), policy)."
        )
    if isinstance(module, dict) or type(module).__name__ in ("FrozenDict", "State"):
        return (
            f"This {type(module).__name__} looks like variables, and apply_policy() "
            "takes the module that they belong to. To cast variables, use "
            "policy.cast_to_param(variables) or cast_for_eval(variables, policy)."
        )
    return (
        f"apply_policy() takes a linen or an nnx module, and this is a "
        f"{type(module).__name__}. For any other function, use "
        "jaxmp.autocast(function, policy)."
    )
