"""Variables without their module: the dtypes of their layers, and casts of trees."""

from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from jaxmp import _tree
from jaxmp.modules._apply import apply_policy
from jaxmp.modules._layers import Application, LayerDtypes, by_rule
from jaxmp.policy import Policy, PolicyLike, default_rules, get_policy
from jaxmp.policy.rule_sets import check_rules, first_match

T = TypeVar("T")


def layer_dtypes_of_variables(
    variables: Mapping[str, Any], application: Application
) -> dict[str, LayerDtypes]:
    """Finds the dtypes of layers of which only the parameters are known.

    Rules by path apply. A layer with a `scale`, and at most a `bias` beside it, is a
    norm: no other layer of Flax has a parameter of that name.
    """
    policy, rules = application[:2]
    params = variables.get("params", variables)
    found: dict[str, set[str]] = {}
    for path in traverse_util.flatten_dict(params):
        found.setdefault(_layer(path), set()).add(str(path[-1]))
    layers = {}
    for path, names in found.items():
        is_norm = _are_of_norm(names)
        rule = first_match(rules, path, None, "norm" if is_norm else None)
        compute = policy.compute_dtype
        layers[path] = by_rule(rule, policy.param_dtype, compute, compute)
    return layers


def cast_for_eval(
    module_or_variables: T, policy: PolicyLike, *, rules: Any = default_rules
) -> T:
    """Casts parameters to the compute dtype once, for evaluation or serving in half.

    Under a mixed policy every call casts the float32 parameters again. Once they are no
    longer trained, half-precision copies are enough.

    Args:
      module_or_variables: an nnx module; a linen module, bound or not; variables: a
        dictionary with `"params"`, or the parameters alone; or any other pytree of
        arrays, such as an Equinox module or the parameters of Haiku.
      policy: what `get_policy` takes; its `param_dtype` does not matter.
      rules: as for `apply_policy`; the default keeps the parameters of norms in
        float32. In variables and other pytrees, rules by path apply, and a norm is
        recognised by its `scale`, or by an object around it that is called a norm.

    Returns:
      The same kind of object. Variables other than parameters keep their dtype. An
      unbound linen module is returned under the policy; cast its variables too.

    Raises:
      PolicyError: for a policy that cannot be read.
      InvalidRule: for rules that cannot be read.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxmp
      >>> model = nn.Dense(2)
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> half = jaxmp.cast_for_eval(variables, "mixed_bfloat16")
      >>> half["params"]["kernel"].dtype
      dtype(bfloat16)
    """
    policy = get_policy(policy)
    half = Policy(
        policy.compute_dtype,
        policy.compute_dtype,
        policy.output_dtype,
        matmul_precision=policy.matmul_precision,
        reduce_dtype=policy.reduce_dtype,
    )
    if isinstance(module_or_variables, nn.Module) and module_or_variables.scope:
        module, variables = module_or_variables.unbind()
        cast = _cast_variables(variables, Application(half, check_rules(rules)))
        return apply_policy(module, half, rules=rules).bind(cast)
    if isinstance(module_or_variables, (nn.Module, nnx.Module)):
        return apply_policy(module_or_variables, half, rules=rules)
    application = Application(half, check_rules(rules))
    if isinstance(module_or_variables, Mapping) and _is_nested(module_or_variables):
        return _cast_variables(module_or_variables, application)
    return _cast_pytree(module_or_variables, application)


def cast_like(variables: T, like: Any) -> tuple[T, dict[str, float]]:
    """Casts variables to the dtypes of others, and reports where that rounds.

    Use it to load a float32 checkpoint into a half-precision model, or back.

    Args:
      variables: pytree of arrays.
      like: pytree of arrays or `jax.ShapeDtypeStruct`s of the same structure.

    Returns:
      The variables in the dtypes of `like`, and a dictionary from the path of every
      leaf that was rounded to its largest relative error. The dictionary is empty if
      the cast is exact, as every cast from half to float32 is.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmp.modules import cast_like
      >>> half, rounded = cast_like({"a": jnp.float32(1.5), "b": jnp.float32(0.1)},
      ...                           {"a": jnp.bfloat16(0), "b": jnp.bfloat16(0)})
      >>> sorted(rounded)
      ['b']
    """
    cast = jax.tree.map(
        lambda x, y: jnp.asarray(x, y.dtype) if _tree.is_inexact(x) else x,
        variables,
        like,
    )
    rounded = {}
    before = jax.tree_util.tree_leaves_with_path(variables)
    for (path, old), new in zip(before, jax.tree.leaves(cast), strict=True):
        if not _tree.is_inexact(old) or old.dtype == new.dtype:
            continue
        wide = jnp.promote_types(old.dtype, new.dtype)
        old, new = jnp.asarray(old, wide), jnp.asarray(new, wide)
        if not bool(jnp.array_equal(old, new, equal_nan=True)):
            scale = jnp.where(old == 0, 1, jnp.abs(old))
            rounded[_tree.path_string(path)] = float(
                jnp.max(jnp.abs(new - old) / scale)
            )
    return cast, rounded


def _are_of_norm(names: set[str]) -> bool:
    return "scale" in names and names <= {"scale", "bias", "offset"}  # Haiku's offset


def _is_nested(variables: Any) -> bool:
    """Whether these are dictionaries of arrays at every level, as Flax makes them."""
    if isinstance(variables, Mapping):
        return all(map(_is_nested, variables.values()))
    return jax.tree.structure(variables) == jax.tree.structure(0)


def _cast_pytree(tree: Any, application: Application) -> Any:
    """Casts the arrays of any pytree; a norm has a `scale` or is called a norm."""
    policy, rules = application[:2]
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    siblings: dict[Any, set[str]] = {}
    for path, _ in leaves:
        siblings.setdefault(path[:-1], set()).add(_tree.path_string(path[-1:]))
    norms = _paths_of_norms(tree)

    def cast(path: Any, x: Any) -> Any:
        names = siblings[path[:-1]]
        is_norm = any(path[: len(norm)] == norm for norm in norms)
        is_norm |= _are_of_norm(names)
        layer = _tree.path_string(path[:-1])
        rule = first_match(rules, layer, None, "norm" if is_norm else None)
        return _tree.cast_floating(x, (rule and rule.params) or policy.param_dtype)

    return jax.tree.unflatten(structure, [cast(path, x) for path, x in leaves])


def _paths_of_norms(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Finds the objects in a pytree that are called a norm, by their paths."""
    if "norm" in type(tree).__name__.lower():
        return [path]
    children = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: x is not tree
    )
    return [
        found
        for below, child in children
        if below
        for found in _paths_of_norms(child, (*path, *below))
    ]


def _layer(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path[:-1]))


def _cast_variables(variables: Any, application: Application) -> Any:
    layers = layer_dtypes_of_variables(variables, application)
    has_collections = "params" in variables
    params = variables["params"] if has_collections else variables
    cast = traverse_util.path_aware_map(
        lambda path, x: _tree.cast_floating(x, layers[_layer(path)].params),
        params,
    )
    return {**variables, "params": cast} if has_collections else cast
