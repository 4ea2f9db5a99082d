"""What depends on the installed JAX release: its version, and the shape of jaxprs."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxmp.errors import UnsupportedJaxVersion

OLDEST_JAX = (0, 10, 0)


def check_jax_version(version: str = jax.__version__) -> None:
    """Raises `UnsupportedJaxVersion` unless `version` is at least `OLDEST_JAX`."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise UnsupportedJaxVersion(
            f"jaxmp needs JAX {oldest} or newer, and JAX {version} is installed. "
            f"Update it: pip install --upgrade 'jax>={oldest}'"
        )


check_jax_version()


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr without its constants; from JAX 0.12 on, there is one class only."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def jaxpr_consts(jaxpr: Any) -> Sequence[Any]:
    """The constants of a jaxpr, in the order of its `constvars`."""
    return getattr(jaxpr, "consts", ())


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and how many carries a scan has, from its parameters."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    raise UnsupportedJaxVersion(
        f"JAX {jax.__version__} describes a scan by {sorted(params)}, which this "
        "version of jaxmp cannot read. Update jaxmp, or install jax<0.13."
    )


def shard_map_arguments(params: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `jax.shard_map` that give these parameters."""
    names = {"mesh", "in_specs", "out_specs", "check_vma", "newly_manual_axes"}
    if set(params) - {"jaxpr"} != names:
        raise UnsupportedJaxVersion(
            f"JAX {jax.__version__} describes a shard_map by {sorted(params)}, which "
            "this version of jaxmp cannot read. Update jaxmp, or install jax<0.13."
        )
    arguments = {name: params[name] for name in names - {"newly_manual_axes"}}
    return {**arguments, "axis_names": set(params["newly_manual_axes"])}


def map_jaxprs(params: dict[str, Any], function: Any) -> dict[str, Any]:
    """The parameters of an equation with `function(jaxpr)` for each jaxpr in them.

    Returns:
      The same object if the function returns each jaxpr as it is.
    """

    def mapped(value: Any) -> Any:
        if hasattr(value, "eqns"):
            return function(value)
        if isinstance(value, tuple) and any(hasattr(item, "eqns") for item in value):
            items = tuple(map(mapped, value))
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else items
        return value

    new = {name: mapped(value) for name, value in params.items()}
    return new if any(new[name] is not params[name] for name in new) else params


def with_lines_of_custom_rules(jaxpr: Any) -> Any:
    """The same jaxpr, whose custom derivative rules are traced under their own lines.

    JAX traces the rule of a call in a jaxpr under the source line of the call.
    """
    from jax._src import source_info_util

    def under_own_lines(rule, *args, **kwargs):
        ambient = source_info_util._source_info_context
        before = ambient.context
        fresh = source_info_util.new_source_info()
        ambient.context = fresh.replace(name_stack=before.name_stack)
        try:
            return rule(*args, **kwargs)
        finally:
            ambient.context = before

    def rewritten(value: Any) -> Any:
        if hasattr(value, "eqns"):
            return rewrite(value)
        if type(value) is tuple and any(hasattr(item, "eqns") for item in value):
            return tuple(map(rewrite, value))
        return value

    def rewrite(jaxpr):
        opened = open_jaxpr(jaxpr)
        eqns = []
        for eqn in opened.eqns:
            params = {name: rewritten(value) for name, value in eqn.params.items()}
            for name in _RULES.get(eqn.primitive.name, ()):
                if hasattr(params.get(name), "wrap"):
                    params[name] = params[name].wrap(under_own_lines, (), None)
            eqns.append(eqn.replace(params=params))
        opened = opened.replace(eqns=eqns)
        return jaxpr.replace(jaxpr=opened) if hasattr(jaxpr, "jaxpr") else opened

    return rewrite(jaxpr)


_RULES = {
    "custom_jvp_call": ("jvp_jaxpr_fun",),
    "custom_vjp_call": ("fwd_jaxpr_thunk", "bwd"),
}


CUDNN_ATTENTION = "jax._src.nn.functions.cudnn_dot_product_attention"
"""What `jax.nn.dot_product_attention` calls with `implementation="cudnn"`.

It is called by this name however the function around it is held, as by a `partial`.
"""


def kept_arguments(lowered: Any) -> Sequence[int]:
    """Positions of the arguments that `jax.jit` has not left out as unused."""
    return sorted(_lowering(lowered).compile_args["kept_var_idx"])


def with_module(lowered: Any, module: Any) -> Any:
    """A lowered function whose program is another module of the same types."""
    _lowering(lowered)._hlo = module
    return lowered


def _lowering(lowered: Any) -> Any:
    found: Any = getattr(lowered, "_lowering", None)
    if not hasattr(found, "_hlo") or "kept_var_idx" not in found.compile_args:
        raise UnsupportedJaxVersion(
            f"JAX {jax.__version__} keeps lowered programs in a way that this version "
            "of jaxmp cannot read. Update jaxmp, or install jax<0.13."
        )
    return found


def merge_common_subexpressions(module: Any) -> None:
    """Merges equal operations of a StableHLO module, in place."""
    from jaxlib.mlir.passmanager import PassManager

    with module.context:
        PassManager.parse("builtin.module(cse)").run(module.operation)


class Recorded(NamedTuple):
    """The equation of an unfinished trace that made a value.

    Attributes:
      name: of the primitive.
      inputs: the values that it was given, to be looked up in turn.
      equation: JAX's own record.
    """

    name: str
    inputs: tuple[Any, ...]
    equation: Any


class _Inside(NamedTuple):
    """A variable of a nested jaxpr, and the equation around it."""

    variable: Any
    producers: dict[Any, Any]
    outer: dict[Any, Any]

    @property
    def aval(self) -> Any:
        return self.variable.aval


def recorded_tangent(x: Any) -> Any:
    """The tangent of a value that is being differentiated, None if none is recorded."""
    tangent = getattr(x, "tangent", None)
    is_recorded = hasattr(tangent, "parent") and hasattr(tangent, "aval")
    return tangent if is_recorded else None


def recorded(x: Any) -> Recorded | None:
    """Looks up how an unfinished trace made a value; None for inputs and constants.

    A nested function that is called as it is (`jax.jit`, `jax.checkpoint`) is looked
    into: its result is what the last equation in it made.
    """
    if isinstance(x, _Inside):
        equation = x.producers.get(x.variable)
        if equation is None:
            outer = x.outer.get(x.variable)
            return None if outer is None else recorded(outer)
        inputs = [v for v in equation.invars if not hasattr(v, "val")]
        values = [x._replace(variable=v) for v in inputs]
        if _name(equation) in _CALLS:
            return _last_inside(equation, x.variable, equation.invars, x)
        return Recorded(_name(equation), tuple(values), equation)
    equation: Any = getattr(x, "parent", None)
    if not hasattr(equation, "in_tracers"):
        return None
    if _name(equation) in _CALLS:
        return _last_inside(equation, x.val, equation.in_tracers, None)
    inputs = tuple(v for v in equation.in_tracers if hasattr(v, "aval"))
    return Recorded(_name(equation), inputs, equation)


def _name(equation: Any) -> str:
    """The name of a primitive; JAX 0.12 wraps those whose gradient it will need."""
    return getattr(equation.primitive, "prim", equation.primitive).name


_CALLS = frozenset(("jit", "pjit", "remat2", "checkpoint", "closed_call", "core_call"))


def _last_inside(
    equation: Any, result: Any, inputs: Sequence[Any], around: Any
) -> Recorded | None:
    jaxpr = open_jaxpr(equation.params.get("jaxpr", equation.params.get("call_jaxpr")))
    if len(jaxpr.invars) != len(inputs):
        return None
    position = [id(v) for v in equation.outvars].index(id(result))
    if around is not None:
        inputs = [around._replace(variable=v) for v in inputs]
    producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    outer = dict(zip(jaxpr.invars, inputs, strict=True))
    variable = jaxpr.outvars[position]
    if hasattr(variable, "val"):
        return None
    return recorded(_Inside(variable, producers, outer))


def is_input(x: Any) -> bool:
    """Whether this is an argument of the function that is being traced."""
    return hasattr(x, "val") and getattr(x, "parent", "none") is None


def same_value(x: Any, y: Any) -> bool:
    """Whether two tracers of one function stand for one variable."""
    return x is y or (hasattr(x, "parent") and getattr(x, "val", x) is y.val)


def sources(x: Any) -> tuple[Any, Sequence[Any]] | None:
    """The equation of an unfinished trace that made a value, and all of its inputs."""
    equation: Any = getattr(x, "parent", None)
    if not hasattr(equation, "in_tracers"):
        return None
    return equation, equation.in_tracers


def is_transposed(equation: Any) -> bool:
    """Whether an equation, or one inside of it, belongs to a backward pass."""
    if "transpose(" in str(equation.source_info.name_stack):
        return True
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple) else (value,):
            if any(map(is_transposed, getattr(open_jaxpr(inner), "eqns", ()))):
                return True
    return False
