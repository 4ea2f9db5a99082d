"""`check_dtypes`: checks that restored arrays have the dtypes that they should have."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._tree import PyTree
from jaxmp.errors import DtypeMismatch
from jaxmp.policy import Policy, PolicyLike, get_policy

MOST_SHOWN = 20


def check_dtypes(tree: PyTree, policy: Policy | str | PyTree) -> None:
    """Raises if arrays are stored in other dtypes than they should be.

    A checkpoint can silently change dtypes: some libraries restore the dtype that was
    saved, others the one that they expect. Everything still runs, in the wrong
    precision.

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`s.
      policy: for parameters, what `get_policy` takes: every real floating leaf has to
        be in `param_dtype`. For mixed parameters and optimizer states, a tree of the
        same structure with the right dtypes: `jax.eval_shape(tx.init, params)`.

    Raises:
      DtypeMismatch: with one line for each leaf that differs.
      PolicyError: for a policy that cannot be read.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> params = {"w": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)}
      >>> jaxmp.check_dtypes(params, "mixed_bfloat16")
      Traceback (most recent call last):
      ...
      jaxmp.errors.DtypeMismatch: 1 of 2 arrays have another dtype than they should ...
        b: bfloat16, should be float32
      Cast them deliberately, ...
    """
    found = _dtypes(tree)
    wanted = _wanted(found, tree, policy)
    wrong = [
        f"  {path}: {_name(found.get(path))}, should be {_name(wanted.get(path))}"
        for path in dict.fromkeys([*found, *wanted])
        if found.get(path) != wanted.get(path)
    ]
    if wrong:
        shown = wrong[:MOST_SHOWN]
        if len(wrong) > MOST_SHOWN:
            shown.append(f"  and {len(wrong) - MOST_SHOWN} more")
        raise DtypeMismatch(
            f"{len(wrong)} of {len(found)} arrays have another dtype than they should "
            "have:\n" + "\n".join(shown) + "\nCast them deliberately, for example by "
            "policy.cast_to_param(params), or restore under the policy that they were "
            "saved under."
        )


def _dtypes(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_tree.path_string(path): jnp.result_type(x) for path, x in leaves}


def _wanted(found: dict[str, Any], tree: PyTree, policy: PolicyLike) -> dict[str, Any]:
    is_tree = jax.tree.structure(policy) == jax.tree.structure(tree)
    if is_tree and not isinstance(policy, (Policy, str)):
        return _dtypes(policy)
    param_dtype = get_policy(policy).param_dtype
    return {
        path: param_dtype if jnp.issubdtype(dtype, jnp.floating) else dtype
        for path, dtype in found.items()
    }


def _name(dtype: Any) -> str:
    return "missing" if dtype is None else dtype.name
