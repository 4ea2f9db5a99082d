"""Policies for nnx modules: a new graph, with other settings and same-name subclasses.

Layers of Flax's own have a `dtype` and a `promote_dtype` function, and get the values
that they would have been built with. A module whose inputs, parameters or outputs have
to be cast at its border, as every module of the user's, becomes an instance of a
subclass of its own class, whose methods cast. Variables keep their types: nothing that
is saved, split or optimised shows the policy, except the dtype of stored parameters.

Sharp edges
- While a method runs, the module's own parameters are replaced by cast ones. So is a
  cache, which is written back in its own dtype.
- Only methods are borders: other code that reads parameters from a module finds them as
  they are stored.
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
from jaxmp.modules._nnx_border import Border, with_border
from jaxmp.modules._nnx_settings import (
    WEIGHT_NORMS,
    author_dtype,
    forget_default,
    has_settings,
    is_transparent,
    settings_for,
    undo_settings,
)
from jaxmp.modules._nnx_variables import own_parameters
from jaxmp.modules._own_code import as_written_settings, own_code_settings
from jaxmp.policy.rule_sets import with_blocks

M = TypeVar("M", bound=nnx.Module)
Layers = dict[str, tuple[nnx.Module, LayerDtypes]]


def apply_to_nnx(module: M, application: Application, check: bool = True) -> M:
    """Returns a new graph with a policy applied, as `apply_policy` documents."""
    new = nnx.clone(module)
    application = in_blocks_of(new, application)
    layers = layers_of(new, application)
    used = [rule for _, dtypes in layers.values() for rule in dtypes.rules]
    check_all_used(application.rules, used, layers)
    for layer, _ in layers.values():
        forget_earlier_policy(layer)
    origins = origins_of(layers, application)
    if check:
        check_leaves(_leaves(layers, origins), type(new).__name__, application)
    for path, (layer, dtypes) in layers.items():
        _apply_to_layer(path, layer, dtypes, origins.get(path), application)
    return new


def in_blocks_of(module: nnx.Module, application: Application) -> Application:
    """The application whose rules know the blocks of layers in a module."""
    paths = [
        _path_string(parts)
        for parts, layer in nnx.iter_modules(module)
        if any(jnp.ndim(p.get_raw_value()) > 1 for p in own_parameters(layer))
    ]
    return application._replace(rules=with_blocks(application.rules, paths))


def layers_of(module: nnx.Module, application: Application) -> Layers:
    """Lists every layer with its dtypes by path; a shared one by its first path."""
    layers: Layers = {}
    for parts, layer in sorted(nnx.iter_modules(module), key=lambda x: len(x[0])):
        if isinstance(layer, (nnx.List, nnx.Dict)):
            continue
        path = _path_string(parts)
        if path == "":
            dtypes = of_root(application.policy, application.rules, layer)
        else:
            _, enclosing = _around(path, layers)[0]
            dtypes = of_layer(enclosing, application.rules, path, layer)
        layers[path] = (layer, dtypes)
    return layers


def forget_earlier_policy(layer: Any) -> None:
    """Turns a layer back into the one that its author built."""
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
        scope=scope,
        gradients=application.gradients_scope(dtypes),
        matmul=application.matmul_scope(layer, dtypes),
        region=own_code_settings(application, dtypes),
        as_written=as_written_settings(application) if application.needs_plan else None,
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
    """Sets up one of Flax's layers, and returns what remains to be done around it."""
    if origin is Origin.AUTHOR:
        return dataclasses.replace(border, is_leaf=True, output=None)
    declared = declared_dtype(vars(layer).get("param_dtype"))
    shown = None if border.names_output else declared
    for name, value in settings_for(layer, dtypes).items():
        setattr(layer, name, value)
    return dataclasses.replace(border, is_leaf=True, shown=shown)


def origins_of(layers: Layers, application: Application) -> dict[str, Origin]:
    """Returns for every layer of Flax who decided its dtype.

    The float32 of a layer was handed down if a module around it has a float32 `dtype`,
    in an attribute or in a config, or if all layers are built with float32.
    """
    leaves = {
        path: (layer, dtypes)
        for path, (layer, dtypes) in layers.items()
        if has_settings(layer)
    }
    # An embedding without a dtype looks like one with the dtype of its parameters.
    counted = [x for x, _ in leaves.values() if kind_of(x) not in ("norm", "embed")]
    all_in_float32 = all(author_dtype(x) == _tree.FLOAT32 for x in counted)
    origins = {}
    for path, (layer, dtypes) in leaves.items():
        author = author_dtype(layer)
        is_below = any(_hands_down(module) for module, _ in _around(path, layers))
        was_handed = author == _tree.FLOAT32 and (
            all_in_float32 or path == "" or is_below
        )
        origins[path] = origin_of(
            author,
            dtypes.expected(layer),
            dtypes,
            application.explicit_dtype,
            was_handed and application.explicit_dtype != "keep",
        )
    return origins


def _around(path: str, layers: Layers) -> list[tuple[nnx.Module, LayerDtypes]]:
    """The layers around one, nearest first; the last is the module itself."""
    around = []
    while path:
        path = path.rpartition("/")[0]
        if path in layers:
            around.append(layers[path])
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


def _store_parameters(layer: nnx.Module, dtype: np.dtype) -> None:
    declared = declared_dtype(vars(layer).get("param_dtype"))
    dtype = dtype if declared == _tree.FLOAT32 else declared
    for parameter in own_parameters(layer):
        stored = _tree.cast_floating(parameter.get_raw_value(), dtype)
        parameter.set_raw_value(stored)


def _path_string(parts: tuple[Any, ...]) -> str:
    """Writes `("blocks", 0, "query")` as "blocks_0/query", as linen names it."""
    path = ""
    for part in parts:
        path += f"_{part}" if isinstance(part, int) else f"/{part}"
    return path.removeprefix("/")
