"""Policies for nnx modules: a new graph, with other settings and same-name subclasses.

Layers of Flax's own have a `dtype` and a `promote_dtype` function, and are set to what
they would have been built with. A module whose inputs, parameters or outputs have to be
cast at its border, as every module of the user's, becomes an instance of a subclass of
its own class, whose methods cast. Variables stay what they were: nothing that is saved,
split or optimised shows the policy, but for the dtype in which parameters are stored.

Sharp edges
- While a method runs, the module's own parameters are replaced by cast ones, and so is
  a cache, which is written back in its own dtype.
- Only methods are borders: parameters that other code reads from a module are as
  stored.
"""

from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmp import _tree
from jaxmp.modules._layers import (
    Application,
    LayerDtypes,
    check_all_used,
    of_layer,
    of_root,
    scope_of,
)
from jaxmp.modules._nnx_border import (
    Border,
    map_variables,
    original_class,
    with_border,
)
from jaxmp.modules._nnx_settings import (
    WEIGHT_NORMS,
    forget_default,
    has_settings,
    is_transparent,
    natural_output,
    settings_for,
    undo_settings,
)

M = TypeVar("M", bound=nnx.Module)
Layers = dict[str, tuple[nnx.Module, LayerDtypes]]


def apply_to_nnx(module: M, application: Application) -> M:
    """Returns a new graph with a policy applied; `apply_policy` has the whole story."""
    new = nnx.clone(module)
    layers = layers_of(new, application)
    used = [dtypes.rule for _, dtypes in layers.values() if dtypes.rule is not None]
    check_all_used(application.rules, used, layers)
    for path, (layer, dtypes) in layers.items():
        scope = scope_of(layer, dtypes.compute) if application.named_scopes else None
        _apply_to_layer(layer, dtypes, scope, application if path == "" else None)
    return new


def layers_of(module: nnx.Module, application: Application) -> Layers:
    """Lists every layer by its path, a shared one by its first, with its dtypes."""
    layers: Layers = {}
    for parts, layer in sorted(nnx.iter_modules(module), key=lambda x: len(x[0])):
        if isinstance(layer, (nnx.List, nnx.Dict)):
            continue
        path = _path_string(parts)
        if path == "":
            dtypes = of_root(application.policy, application.rules, layer)
        else:
            around = _enclosing(path, layers)
            dtypes = of_layer(around, application.rules, path, layer)
        layers[path] = (layer, dtypes)
    return layers


def own_parameters(layer: nnx.Module) -> dict[str, list[nnx.Param]]:
    """Lists a layer's parameters by attribute, without those of the layers inside."""
    found: dict[str, list[nnx.Param]] = {}
    for name, value in vars(layer).items():

        def collect(variable, name=name):
            if isinstance(variable, nnx.Param):
                found.setdefault(name, []).append(variable)
            return variable

        map_variables(collect, value)
    return found


def _apply_to_layer(
    layer: Any,
    dtypes: LayerDtypes,
    scope: str | None,
    application: Application | None,
) -> None:
    """Applies dtypes to one layer; `application` is given for the outermost one."""
    is_root = application is not None
    cls = original_class(type(layer))
    object.__setattr__(layer, "__class__", cls)
    undo_settings(layer)
    forget_default(layer)
    _store_parameters(layer, dtypes.params)
    named = dtypes.rule is not None and not dtypes.rule.yields_to_author
    if issubclass(cls, WEIGHT_NORMS):
        layer.dtype = dtypes.params
    if is_transparent(cls) and not (is_root or named):
        return
    border = Border(dtypes.compute, dtypes.compute, dtypes.output, scope)
    if has_settings(layer):
        settings = settings_for(layer, dtypes)
        if settings is None:
            return
        for name, value in settings.items():
            setattr(layer, name, value)
        border = Border(None, None, dtypes.output, scope)
        is_attention = isinstance(layer, nnx.MultiHeadAttention)
        is_natural = natural_output(layer, settings) == dtypes.output
        if is_natural and not is_attention and not is_root:
            if scope is None:
                return
            border = Border(None, None, None, scope)
    object.__setattr__(layer, "__class__", with_border(cls, border, application))


def _store_parameters(layer: nnx.Module, dtype: np.dtype) -> None:
    declared = jnp.dtype(getattr(layer, "param_dtype", None) or jnp.float32)
    dtype = dtype if declared == jnp.float32 else declared
    for parameters in own_parameters(layer).values():
        for parameter in parameters:
            stored = _tree.cast_floating(parameter.get_raw_value(), dtype)
            parameter.set_raw_value(stored)


def _path_string(parts: tuple[Any, ...]) -> str:
    """Writes `("blocks", 0, "query")` as "blocks_0/query", as linen names it."""
    path = ""
    for part in parts:
        path += f"_{part}" if isinstance(part, int) else f"/{part}"
    return path.removeprefix("/")


def _enclosing(path: str, layers: Layers) -> LayerDtypes:
    while path:
        path = path.rpartition("/")[0]
        if path in layers:
            return layers[path][1]
    return layers[""][1]
