"""`describe`: what every layer stores, computes and returns, and which rule decided."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from jaxmp import _tree
from jaxmp._jaxpr.arguments import open_scopes
from jaxmp._jaxpr.flax_internals import is_lifted
from jaxmp.casting.quantized.formats import MatmulFormat, format_lines
from jaxmp.errors import MissingExample
from jaxmp.modules._description import Description, Row, natural_order, outer_first
from jaxmp.modules._formats import formats_in, with_formats
from jaxmp.modules._layers import (
    Application,
    LayerDtypes,
    Origin,
    application_of,
    is_of_flax,
    original_class,
)
from jaxmp.modules._linen import apply_to_linen
from jaxmp.modules._linen_interceptor import Visit, watch
from jaxmp.modules._linen_layers import is_transparent
from jaxmp.modules._nnx import (
    apply_to_nnx,
    forget_earlier_policy,
    in_blocks_of,
    layers_of,
    origins_of,
)
from jaxmp.modules._nnx_settings import is_transparent as is_transparent_in_nnx
from jaxmp.modules._nnx_variables import own_parameters
from jaxmp.modules._variables import layer_dtypes_of_variables
from jaxmp.policy import PolicyLike, PolicyRule, default_rules, get_policy
from jaxmp.policy.rule_sets import check_rules


def describe(
    module: Any,
    policy: PolicyLike,
    *example_args: Any,
    rules: Any = default_rules,
    explicit_dtype: Literal["override", "keep"] | None = None,
    own_code: Literal["autocast", "half"] = "autocast",
) -> Description:
    """Lists what every layer of a module stores, computes in and returns.

    Args:
      module: a linen module, an nnx module, or variables. Variables show only their
        paths: rules by path apply, and a norm is recognised by its `scale`.
      policy: what `get_policy` takes.
      *example_args: the arguments of a call: arrays or `jax.ShapeDtypeStruct`s.
        Nothing is computed. A linen module needs them; of an nnx module they show how
        each layer multiplies, if the policy or a rule asks for a smaller format.
      rules: as for `apply_policy`.
      explicit_dtype: as for `apply_policy`.
      own_code: as for `apply_policy`.

    Returns:
      A `Description`. `print` shows it as a table in which repeated blocks share a
      line; `rows` lists every layer.

    Raises:
      MissingExample: for a linen module without example arguments.
      PolicyError: for a policy that cannot be read.
      InvalidRule: for rules that cannot be read.
      UnusedRule: for a rule that matches no layer.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, jaxmp
      >>> model = nn.Sequential([nn.Dense(8), nn.LayerNorm()])
      >>> print(jaxmp.describe(model, "mixed_bfloat16", jnp.ones((1, 4))))
      policy p=full,c=bf16,o=full
      <BLANKLINE>
      PATH      TYPE        STORED   COMPUTES  RETURNS   RULE
      (model)   Sequential           bfloat16  float32   policy
      layers_0  Dense       float32  bfloat16  bfloat16  policy
      layers_1  LayerNorm   float32  float32   bfloat16  kind='norm'
    """
    application = Application(
        get_policy(policy),
        check_rules(rules),
        explicit_dtype=explicit_dtype,
        own_code=own_code,
    )
    if isinstance(module, nn.Module):
        rows, formats = _rows_of_linen(module, application, example_args)
    elif isinstance(module, nnx.Module):
        rows, formats = _rows_of_nnx(module, application, example_args)
    else:
        rows, formats = _rows_of_variables(module, application), []
    title = f"policy {application.policy}"
    replaced = application_of(module)
    if replaced is not None and replaced.policy != application.policy:
        title += f", in place of {replaced.policy}"
    shares = format_lines(formats, sum(found.flops for found in formats))
    return Description(title, tuple(with_formats(rows, formats)), shares)


def _rows_of_linen(
    module: nn.Module, application: Application, example_args: tuple[Any, ...]
) -> tuple[list[Row], list[MatmulFormat]]:
    if not example_args:
        raise MissingExample(
            f"The layers of a linen module are not known before it is called, and "
            f"describe() of {type(module).__name__} was given no example. Pass the "
            "arguments of its call: describe(model, policy, jnp.zeros((1, 28, 28)))."
        )
    policied = apply_to_linen(module, application)
    visits: list[Visit] = []
    returned: list[str] = []
    key = jax.random.key(0)
    rngs = {"params": key, "dropout": key}

    def init(args: tuple[Any, ...]) -> Any:
        output, variables = policied.init_with_output(rngs, *args)
        returned.append(_dtypes_in(output))
        return variables

    with watch(visits.append):
        variables = jax.eval_shape(init, example_args)
    stored = _stored(variables.get("params", {}))
    rows: dict[tuple[str, str], Row] = {}
    for visit in visits:
        name = _class_name(type(visit.module))
        # The model's result is cast where it leaves the plan, after the visit.
        returns = _dtypes_in(visit.output) if visit.path else returned[-1]
        if visit.path and _is_planned(visit.module, visit.dtypes, application):
            returns = "as planned"
        if (visit.path, name) in rows:
            before = rows[visit.path, name].returns
            returns = _joined({*before.split(", "), *returns.split(", ")})
        rows[visit.path, name] = _row(
            visit.path,
            name,
            stored.get(visit.path, ""),
            visit.dtypes,
            returns=returns,
            origin=visit.origin,
            author=getattr(visit.module, "dtype", None),
            is_applied=visit.path == "" or not is_transparent(visit.module),
        )
    formats: list[MatmulFormat] = []
    if application.quantizes:
        apply = functools.partial(policied.apply, rngs=rngs, mutable=True)
        formats = formats_in(apply, variables, *example_args)
    return outer_first(rows.values()), formats


def _rows_of_nnx(
    module: nnx.Module, application: Application, example_args: tuple[Any, ...]
) -> tuple[list[Row], list[MatmulFormat]]:
    policied = apply_to_nnx(module, application, check=False)
    application = in_blocks_of(policied, application)
    originals = layers_of(nnx.clone(module), application)
    for layer, _ in originals.values():
        forget_earlier_policy(layer)
    origins = origins_of(originals, application)
    rows = []
    layer: Any
    for path, (layer, dtypes) in layers_of(policied, application).items():
        stored = _joined({str(p.dtype) for p in own_parameters(layer)})
        origin = origins.get(path, Origin.POLICY)
        is_authors = origin is Origin.AUTHOR
        is_applied = path == "" or not is_transparent_in_nnx(type(layer))
        returns = str(dtypes.output) if is_applied else "as given"
        if is_authors:
            returns = str(jnp.dtype(layer.dtype))
        elif path and is_applied and _is_planned(layer, dtypes, application):
            returns = "as planned"
        rows.append(
            _row(
                path,
                type(layer).__name__,
                stored,
                dtypes,
                returns=returns,
                origin=origin,
                author=layer.dtype if is_authors else None,
                is_applied=is_applied,
            )
        )
    formats: list[MatmulFormat] = []
    if application.quantizes and example_args:
        named = nnx.clone(policied)
        open_scopes([named])
        formats = formats_in(named, *example_args)
    return sorted(rows, key=natural_order), formats


def _rows_of_variables(variables: Any, application: Application) -> list[Row]:
    return [
        _row(path, "", str(dtypes.params), dtypes, returns=str(dtypes.output))
        for path, dtypes in layer_dtypes_of_variables(variables, application).items()
    ]


def _row(
    path: str,
    name: str,
    stored: str,
    dtypes: LayerDtypes,
    *,
    returns: str,
    origin: Origin = Origin.POLICY,
    author: Any = None,
    is_applied: bool = True,
) -> Row:
    reduces = "" if dtypes.reduce is None else str(dtypes.reduce)
    if origin is Origin.AUTHOR:
        computes = str(jnp.dtype(author))
        return Row(path, name, stored, computes, returns, Origin.AUTHOR.value, reduces)
    computes = str(dtypes.compute) if is_applied else "as given"
    is_handed_down = origin is Origin.HANDED_DOWN and dtypes.rule is None
    decided = Origin.HANDED_DOWN.value if is_handed_down else _rule_text(dtypes.rule)
    return Row(path, name, stored, computes, returns, decided, reduces)


def _is_planned(module: Any, dtypes: LayerDtypes, application: Application) -> bool:
    """Whether a plan decides the dtype in which a layer's result is read."""
    is_half = application.policy.compute_dtype != _tree.FLOAT32
    is_own_code = application.own_code == "autocast" and not is_of_flax(type(module))
    return is_half and is_own_code and not dtypes.names_output


def _rule_text(rule: PolicyRule | None) -> str:
    if rule is None:
        return "policy"
    text = str(rule).removeprefix("PolicyRule(").removesuffix(")")
    return re.split(r", (?=params=|compute=|output=|reduce=|quantize=)", text)[0]


def _class_name(cls: type[nn.Module]) -> str:
    """The name of a class before nn.remat, nn.jit and the like renamed it."""
    bases = original_class(cls).__mro__
    return next(base.__name__ for base in bases if not is_lifted(base))


def _stored(params: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        for array in jax.tree.leaves(leaf):
            found.setdefault("/".join(path[:-1]), set()).add(str(array.dtype))
    return {path: _joined(names) for path, names in found.items()}


def _dtypes_in(output: Any) -> str:
    return _joined({str(x.dtype) for x in jax.tree.leaves(output) if _tree.is_array(x)})


def _joined(names: Iterable[str]) -> str:
    return ", ".join(sorted(name for name in names if name))
