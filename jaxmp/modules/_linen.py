"""Policies for linen modules, by an interceptor of Flax's method calls.

`apply_policy` makes a subclass of the module's class whose methods run under an
interceptor. On every call of a layer inside, the interceptor finds the layer's dtypes.
For the time of the call, it

- sets `dtype` on a layer of Flax's own, which then casts its inputs and parameters just
  as if the dtype had been written into the model;
- runs the code of a user's layer as it was written, in a region that is planned
  (`_own_code`), or, with `own_code="half"`, casts its inputs, parameters and outputs.

Parameters are cast when they are initialised, and stored in that dtype.

Sharp edges
- `nn.jit` reuses a trace if the module's fingerprint is the same. So the application is
  put into the scope's flags, which are part of the fingerprint. The flags also
  distinguish the layers inside from those of another model that is called meanwhile.
- A cell returns its carry in the dtype in which it came, or a scan over it would not
  have equal types at both ends.
- Layers of a bound module can be called without it, as in
  `model.bind(variables).encoder(x)`; they get their own subclass when looked up.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax.core import Scope

from jaxmp._jaxpr.flax_internals import CALL_WRAPPED_METHOD, is_lifted
from jaxmp.casting.local import run_region
from jaxmp.casting.plan.plan import JaxprPlan
from jaxmp.modules._casts import carry_of, cast_carry
from jaxmp.modules._effect import check_plan
from jaxmp.modules._layers import (
    Application,
    application_of,
    of_root,
    original_class,
)
from jaxmp.modules._linen_fields import linen_fields, modules_in
from jaxmp.modules._linen_interceptor import Interceptor, Path, running
from jaxmp.modules._linen_layers import is_leaf
from jaxmp.modules._own_code import opens_region, own_code_settings, region


def apply_to_linen(module: nn.Module, application: Application) -> nn.Module:
    """Returns the module with a policy applied, as `apply_policy` documents."""
    fields = linen_fields(module)
    cls = _policied(original_class(type(module)), application, ())
    # A module made inside @compact is already bound; the new one takes its scope.
    parent = module.parent if module.scope is None else module.scope
    return cls(**fields, parent=parent, name=module.name)


@functools.lru_cache(maxsize=4096)
def _policied(
    cls: type[nn.Module], application: Application, inside: Path
) -> type[nn.Module]:
    """The same-name subclass for one application; equal applications share it.

    `inside` is the module's path below the module that the policy was applied to.
    """
    methods = {
        **_intercepted_methods(cls, application, inside),
        **_other_methods(cls, application, inside),
    }
    return type(
        cls.__name__,
        (cls,),
        {
            **{name: nn.nowrap(method) for name, method in methods.items()},
            "_original_class": cls,
            "_application": application,
            "_inside": inside,
            "_used_rules": set(),
            "_leaves": {},
            "_said": set(),
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        },
    )


def _intercepted_methods(
    cls: type[nn.Module], application: Application, inside: Path
) -> dict[str, Callable[..., Any]]:
    """The methods that every call goes through, run under an interceptor."""

    def run(self: Any, name: str, call: Callable[[], Any]) -> Any:
        if self.scope is None or any(i.covers(self.scope) for i in running.get()):
            return call()
        return Interceptor(application, self.path, inside).run(self, name, call)

    def call_wrapped_method(self: Any, fun: Any, args: Any, kwargs: Any) -> Any:
        wrapped = getattr(cls, CALL_WRAPPED_METHOD)
        call = functools.partial(wrapped, self, fun, args, kwargs)
        return run(self, getattr(fun, "__name__", ""), call)

    def call_lifted_method(name: str, lifted: Any) -> Callable[..., Any]:
        @functools.wraps(lifted)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return run(self, name, functools.partial(lifted, self, *args, **kwargs))

        return method

    # The methods of classes that nn.remat and the like make do not pass through there.
    lifted = {
        name: call_lifted_method(name, method)
        for name, method in vars(cls).items()
        if is_lifted(cls) and hasattr(method, "__wrapped__")
    }
    return {**lifted, CALL_WRAPPED_METHOD: call_wrapped_method}


def _other_methods(
    cls: type[nn.Module], application: Application, inside: Path
) -> dict[str, Callable[..., Any]]:
    """Methods that give layers the policy when looked up, plan `apply`, and pickle."""

    def get_attribute(self: Any, name: str) -> Any:
        return _policy_children(self, name, cls.__getattribute__(self, name))

    def get_missing_attribute(self: Any, name: str) -> Any:
        return _policy_children(self, name, cls.__getattr__(self, name))

    def apply(
        self: Any,
        variables: Any,
        *args: Any,
        rngs: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        run = functools.partial(cls.apply, self, mutable=mutable)
        if self.scope is not None or not _plans_own_code(self, application):
            return run(variables, *args, rngs=rngs, **kwargs)
        return _apply_in_region(
            self, application, run, variables, args, rngs, mutable, kwargs
        )

    def reduce(self: Any) -> tuple[Any, ...]:
        return _rebuild, (cls, linen_fields(self), self.name, application, inside)

    return {
        "__getattribute__": get_attribute,
        "__getattr__": get_missing_attribute,
        "__reduce__": reduce,
        "apply": apply,
    }


def _plans_own_code(module: nn.Module, application: Application) -> bool:
    """Whether the code of a module and its layers is planned when it is applied."""
    dtype = of_root(application.policy, application.rules, module).compute
    is_planned = application.own_code == "autocast" and opens_region(dtype)
    return is_planned and not is_leaf(module)


def _apply_in_region(
    module: Any,
    application: Application,
    apply: Callable[..., Any],
    variables: Any,
    args: tuple[Any, ...],
    rngs: Any,
    mutable: Any,
    kwargs: dict[str, Any],
) -> Any:
    """Calls `module.apply` as one region: a pure function, traced and planned."""
    dtypes = of_root(application.policy, application.rules, module)
    static = ("method", "capture_intermediates")
    static_kwargs = {name: kwargs.pop(name) for name in static if name in kwargs}

    def run(variables: Any, args: Any, rngs: Any, kwargs: Any) -> Any:
        output = apply(variables, *args, rngs=rngs, **kwargs, **static_kwargs)
        output, *updates = output if mutable is not False else (output,)
        output = cast_carry(carry_of(module, args, kwargs), output, dtypes.output)
        return (output, *updates) if updates else output

    def watch(plan: JaxprPlan) -> None:
        if static_kwargs.get("method") in (None, "__call__"):
            name = original_class(type(module)).__name__
            check_plan(plan, type(module)._leaves, name, application)

    settings = own_code_settings(application, dtypes)
    assert settings is not None
    with region(dtypes.compute):
        return run_region(
            run,
            (variables, args, rngs, kwargs),
            settings,
            application.named_scopes,
            watch,
            functools.partial(
                Interceptor(application, (), type(module)._inside).around_rules,
                dtypes.compute,
            ),
        )


def _rebuild(
    cls: type[nn.Module],
    fields: dict[str, Any],
    name: str | None,
    application: Application,
    inside: Path,
) -> nn.Module:
    return _policied(cls, application, inside)(**fields, name=name)


def _policy_children(parent: nn.Module, name: str, value: Any) -> Any:
    """Gives the layers of a bound module the policy of the module around them."""
    if name.startswith("_") or name in ("parent", "scope", "name"):
        return value
    for child in modules_in(value):
        if child.scope is not None:
            _policy_child(type(parent), parent.scope, child)
    return value


def _policy_child(cls: Any, scope: Scope | None, child: nn.Module) -> None:
    if scope is None or child.scope is None or application_of(child) is not None:
        return
    if child.scope.path[: len(scope.path)] == scope.path:
        inside = cls._inside + child.scope.path[len(scope.path) :]
        policied = _policied(type(child), cls._application, inside)
        object.__setattr__(child, "__class__", policied)
