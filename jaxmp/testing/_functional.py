"""One functional interface to linen and nnx modules, with the same values in both."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxmp import _tree

Record = dict[str, list[Any]]
_ZEROS = ("mean", "cached_key", "cached_value")


def split_linen(
    module: nn.Module, inputs: tuple[Any, ...], record: Record
) -> tuple[Callable[..., Any], Any, Any]:
    """Returns `apply(params, state, *inputs)` and a module's parameters and state."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = dict(_filled(jax.eval_shape(module.init, keys, *inputs)))
    params = variables.pop("params")
    variables.pop("intermediates", None)

    def apply(params: Any, state: Any, *inputs: Any) -> tuple[Any, Any]:
        variables, key = state
        key, dropout = jax.random.split(key)
        output, variables = module.apply(
            {"params": params, **variables},
            *inputs,
            rngs={"dropout": dropout},
            capture_intermediates=True,
            mutable=[*variables, "intermediates"],
        )
        layers = variables.pop("intermediates")
        for path, x in jax.tree_util.tree_leaves_with_path(layers):
            layer = path_of(path).partition("__call__")[0].removesuffix("/")
            record.setdefault(layer, []).append(jax.typeof(x))
        return output, (variables, key)

    return apply, params, (variables, jax.random.key(2))


def split_nnx(
    module: nnx.Module, record: Record
) -> tuple[Callable[..., Any], Any, Any]:
    """Returns `apply(params, state, *inputs)` and a module's parameters and state."""
    module = nnx.clone(module)
    for path, layer in nnx.iter_modules(module):
        layer.__class__ = _recording(type(layer), path_of(path), record)
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def apply(params: Any, state: Any, *inputs: Any) -> tuple[Any, Any]:
        module = nnx.merge(graph, params, state, copy=True)
        output = module(*inputs)
        _, _, state = nnx.split(module, nnx.Param, ...)
        return output, state

    return apply, _filled(params), _filled(state)


def _recording(cls: type, path: str, record: Record) -> type:
    """A class like `cls` that records the types of its outputs under `path`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.__call__(self, *args, **kwargs)
        record.setdefault(path, []).extend(map(jax.typeof, jax.tree.leaves(output)))
        return output

    return type(cls.__name__, (cls,), {"__call__": call})


def _filled(tree: Any) -> Any:
    """Values for an abstract tree, the same for linen and nnx.

    Initialisers would take longer to compile than the network; this compiles nothing.
    """

    def fill(path: tuple[Any, ...], x: Any) -> jax.Array:
        name = path_of(path)
        last = name.rpartition("/")[2]
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), x.shape)
        if jnp.issubdtype(x.dtype, jnp.integer) or last in _ZEROS:
            return jnp.zeros(x.shape, x.dtype)
        if last == "var":
            return jnp.ones(x.shape, x.dtype)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        noise = rng.normal(size=x.shape).astype(np.float32)
        if last == "kernel":
            noise /= np.sqrt(np.prod(x.shape[:-1]))
        elif last == "scale":
            noise = 1 + 0.1 * noise
        elif last == "embedding":
            noise /= np.sqrt(x.shape[-1])
        else:
            noise *= 0.1
        return jnp.asarray(noise, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def path_of(path: tuple[Any, ...]) -> str:
    """Writes a path the same way for linen and nnx: `"blocks_0/conv/kernel"`."""
    if path and isinstance(path[0], (str, int)):
        parts = [str(part) for part in path]
    else:
        written = _tree.path_string(path).removesuffix("/value")
        parts = [part for part in written.split("/") if part != "params"]
    joined = ""
    for part in parts:
        joined += f"_{part}" if part.isdigit() else f"/{part}"
    return joined.removeprefix("/")
