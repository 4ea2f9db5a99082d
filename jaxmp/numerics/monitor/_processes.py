"""Arrays that are divided over the devices of several processes, and a common pace."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")


def whole_on_host(tree: T) -> T:
    """Gives this process all of every array; every process has to call it.

    Args:
      tree: any pytree.

    Returns:
      The tree, with arrays of NumPy, or keys, where one was on other processes too.
    """
    return jax.tree.map(_whole, tree)


def wait_for_all(name: str) -> None:
    """Returns once every process of the run has come to this point.

    Args:
      name: of the point; processes that wait at different ones raise.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _whole(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _whole(jax.random.key_data(x))
        return jax.random.wrap_key_data(data, impl=str(jax.random.key_impl(x)))
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
