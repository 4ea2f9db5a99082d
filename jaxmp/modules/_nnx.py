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

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmp import _tree
from jaxmp.modules._effect import Leaf, check_leaves
from jaxmp.modules._handed_down import fields_of, hands_down
from jaxmp.modules._layers import (
    Application,
    LayerDtypes,
    Origin,
    check_all_used,
    declared_dtype,
    is_of_flax,
    kind_of,
    of_layer,
    of_root,
    origin_of,
    original_class,
    scope_of,
)
from jaxmp.modules._nnx_border import (
    Border,
    map_variables,
    with_border,
)
from jaxmp.modules._nnx_settings import (
    WEIGHT_NORMS,
    author_dtype,
    forget_default,
    has_settings,
    is_transparent,
    settings_for,
    undo_settings,
)

M = TypeVar("M", bound=nnx.Module)
Layers = dict[str, tuple[nnx.Module, LayerDtypes]]


def apply_to_nnx(module: M, application: Application, check: bool = True) -> M:
    """Returns a new graph with a policy applied; `apply_policy` has the whole story."""
    new = nnx.clone(module)
    layers = layers_of(new, application)
    used = [dtypes.rule for _, dtypes in layers.values() if dtypes.rule is not None]
    check_all_used(application.rules, used, layers)
    for layer, _ in layers.values():
        forget_earlier_policy(layer)
    origins = origins_of(layers, application)
    if check:
        check_leaves(_leaves(layers, origins), type(new).__name__, application)
    for path, (layer, dtypes) in layers.items():
        _apply_to_layer(path, layer, dtypes, origins.get(path), application)
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


def forget_earlier_policy(layer: Any) -> None:
    """Makes a layer again what its author built."""
    object.__setattr__(layer, "__class__", original_class(type(layer)))
    undo_settings(layer)
    forget_default(layer)


def _apply_to_layer(
    path: str,
    layer: Any,
    dtypes: LayerDtypes,
    origin: Origin | None,
    application: Application,
) -> None:
    """Applies dtypes to one layer."""
    cls, is_root = type(layer), path == ""
    _store_parameters(layer, dtypes.params)
    named = dtypes.rule is not None and not dtypes.rule.yields_to_author
    if issubclass(cls, WEIGHT_NORMS):
        layer.dtype = dtypes.params
    if is_transparent(cls) and not (is_root or named):
        return
    scope = scope_of(layer, dtypes.compute) if application.named_scopes else None
    border = Border(
        is_leaf=False,
        compute=dtypes.compute,
        params=dtypes.params,
        output=dtypes.output,
        names_output=dtypes.names_output,
        plans=application.own_code == "autocast",
        named_scopes=application.named_scopes,
        precision=dtypes.precision,
        scope=scope,
    )
    if origin is not None:
        border = _leaf_border(layer, dtypes, border, origin)
    elif application.own_code == "half" and application.explicit_dtype != "keep":
        is_norm = kind_of(layer) == "norm"
        handed = dtypes.output if is_norm else dtypes.compute
        border = dataclasses.replace(border, hands_down=handed)
    applied = application if is_root else None
    object.__setattr__(layer, "__class__", with_border(cls, border, applied))


def _leaf_border(
    layer: Any, dtypes: LayerDtypes, border: Border, origin: Origin
) -> Border:
    """Sets one of Flax's layers up, and returns what is left to do around it."""
    if origin is Origin.AUTHOR:
        return dataclasses.replace(border, is_leaf=True, output=None)
    shown = (
        None if border.names_output else declared_dtype(vars(layer).get("param_dtype"))
    )
    for name, value in settings_for(layer, dtypes).items():
        setattr(layer, name, value)
    return dataclasses.replace(border, is_leaf=True, shown=shown)


def origins_of(layers: Layers, application: Application) -> dict[str, Origin]:
    """Tells for every layer of Flax who decided about its dtype.

    A layer that is built with float32 was handed it where a module around it has a
    float32 `dtype`, in an attribute or in a config, or where every layer says so.
    """
    leaves = {
        path: (layer, dtypes)
        for path, (layer, dtypes) in layers.items()
        if has_settings(layer)
    }
    # An embedding without a dtype looks like one with that of its parameters.
    counted = [x for x, _ in leaves.values() if kind_of(x) not in ("norm", "embed")]
    all_say_so = all(author_dtype(layer) == _FLOAT32 for layer in counted)
    origins = {}
    for path, (layer, dtypes) in leaves.items():
        author = author_dtype(layer)
        around = _modules_around(path, layers)
        was_handed = author == _FLOAT32 and (
            all_say_so or path == "" or any(map(_hands_down, around))
        )
        origins[path] = origin_of(
            author,
            dtypes.expected(layer),
            dtypes,
            application.explicit_dtype,
            was_handed and application.explicit_dtype != "keep",
        )
    return origins


def _modules_around(path: str, layers: Layers) -> list[Any]:
    """The modules around a layer, the nearest first."""
    around = []
    while path:
        path = path.rpartition("/")[0]
        if path in layers:
            around.append(layers[path][0])
    return around


def _hands_down(module: Any) -> bool:
    return not is_of_flax(type(module)) and hands_down(fields_of(module))


def _leaves(layers: Layers, origins: dict[str, Origin]) -> dict[str, Leaf]:
    """The layers of Flax that multiply or look up."""
    leaves = {}
    for path, origin in origins.items():
        layer, dtypes = layers[path]
        if kind_of(layer) in (None, "norm"):
            continue
        is_kept = origin is Origin.AUTHOR
        dtype = author_dtype(layer) if is_kept else dtypes.compute
        parameters = nnx.state(layer, nnx.Param)
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(parameters))
        leaves[path] = Leaf(type(layer).__name__, origin, dtype, size)
    return leaves


_FLOAT32 = jnp.dtype(jnp.float32)


def _store_parameters(layer: nnx.Module, dtype: np.dtype) -> None:
    declared = declared_dtype(vars(layer).get("param_dtype"))
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
