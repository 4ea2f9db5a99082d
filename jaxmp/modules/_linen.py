"""Policies for linen modules, by an interceptor of Flax's method calls.

`apply_policy` makes a subclass of the module's class whose methods run under an
interceptor. On every call of every layer inside, the interceptor finds the layer's
dtypes and, for the time of the call,

- sets `dtype` on a layer of Flax's own, which then casts its inputs and parameters just
  as if the dtype had been written into the model;
- casts the inputs, the parameters and the outputs of a layer of the user's.

Parameters are cast where they are initialised, and stored so.

Sharp edges
- `nn.jit` reuses a trace where the module's fingerprint is the same. The application is
  therefore put into the scope's flags, which are part of the fingerprint, and which
  also tell the layers inside from those of another model that is called meanwhile.
- A cell hands its carry back in the dtype in which it came, or a scan over it would not
  have equal types at both ends.
- Layers of a bound module can be called without it, as in
  `model.bind(variables).encoder(x)`; they get a subclass of their own when looked up.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import Scope, freeze

from jaxmp.casting._region import region_settings, run_region
from jaxmp.modules._casts import carry_of, cast_carry
from jaxmp.modules._effect import Leaf, check_leaves, check_plan
from jaxmp.modules._handed_down import fields_of, handed_down
from jaxmp.modules._layers import (
    Application,
    LayerDtypes,
    Origin,
    check_all_used,
    is_flax_layer,
    kind_of,
    of_layer,
    of_root,
    scope_of,
)
from jaxmp.modules._linen_layers import (
    LayerCall,
    adapt_flax_layer,
    adapt_transparent_layer,
    adapt_user_layer,
    as_written,
    attributes,
    is_leaf,
    is_transparent,
    origin_in,
)
from jaxmp.modules._linen_region import planned_method
from jaxmp.modules._own_code import inside_region, opens_region, region_dtype
from jaxmp.policy import PolicyRule

Path = tuple[str, ...]
_FLAG = "jaxmp"
_REGION_FLAG = "jaxmp_region"


class Visit(NamedTuple):
    """One call of one layer."""

    path: str
    module: nn.Module
    dtypes: LayerDtypes
    origin: Origin
    output: Any


_running: contextvars.ContextVar[tuple["_Interceptor", ...]] = contextvars.ContextVar(
    "interceptors", default=()
)


def apply_to_linen(module: nn.Module, application: Application) -> nn.Module:
    """Returns the module with a policy applied; `apply_policy` has the whole story."""
    fields = _fields(module)
    cls = _policied(original_class(type(module)), application, ())
    # A module made inside of @compact is bound already; the new one takes its scope.
    parent = module.parent if module.scope is None else module.scope
    return cls(**fields, parent=parent, name=module.name)


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Returns the class that the user wrote."""
    return getattr(cls, "_original_class", cls)


def application_of(module: nn.Module) -> Application | None:
    """Returns what was applied to a module, if anything was."""
    return getattr(type(module), "_application", None)


@functools.lru_cache(maxsize=4096)
def _policied(
    cls: type[nn.Module], application: Application, inside: Path
) -> type[nn.Module]:
    """The same-name subclass for one application; equal applications share it.

    `inside` is the module's path below the one that the policy was applied to.
    """

    def run(self, name, call):
        if self.scope is None or any(i.covers(self.scope) for i in _running.get()):
            return call()
        return _Interceptor(application, self.path, inside).run(self, name, call)

    def call_wrapped_method(self, fun, args, kwargs):
        call = functools.partial(cls._call_wrapped_method, self, fun, args, kwargs)
        return run(self, getattr(fun, "__name__", ""), call)

    def call_lifted_method(name):
        def method(self, *args, **kwargs):
            return run(
                self, name, functools.partial(lifted[name], self, *args, **kwargs)
            )

        return functools.wraps(lifted[name])(method)

    # nn.remat and its like make classes whose methods do not pass through the above.
    is_lifted = cls.__module__ == "flax.linen.transforms"
    lifted = {
        name: fun
        for name, fun in vars(cls).items()
        if is_lifted and hasattr(fun, "__wrapped__")
    }

    def get_attribute(self, name):
        return _policy_children(self, name, cls.__getattribute__(self, name))

    def get_missing_attribute(self, name):
        return _policy_children(self, name, cls.__getattr__(self, name))

    def apply(self, variables, *args, rngs=None, mutable=False, **kwargs):
        run = functools.partial(cls.apply, self, mutable=mutable)
        if self.scope is not None or not _plans_own_code(self, application):
            return run(variables, *args, rngs=rngs, **kwargs)
        return _apply_in_region(self, run, variables, args, rngs, mutable, kwargs)

    def reduce(self):
        return _rebuild, (cls, _fields(self), self.name, application, inside)

    overrides = {
        **{name: call_lifted_method(name) for name in lifted},
        "_call_wrapped_method": call_wrapped_method,
        "__getattribute__": get_attribute,
        "__getattr__": get_missing_attribute,
        "__reduce__": reduce,
        "apply": apply,
    }
    return type(
        cls.__name__,
        (cls,),
        {
            **{name: nn.nowrap(fun) for name, fun in overrides.items()},
            "_original_class": cls,
            "_application": application,
            "_inside": inside,
            "_used_rules": set(),
            "_leaves": {},
            "_is_checked": False,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        },
    )


def _plans_own_code(module: nn.Module, application: Application) -> bool:
    """Whether the code of a module, and of what is inside, is planned when applied."""
    dtype = of_root(application.policy, application.rules, module).compute
    is_planned = application.own_code == "autocast" and opens_region(dtype)
    return is_planned and not is_leaf(module)


def _apply_in_region(
    module: Any,
    apply: Callable[..., Any],
    variables: Any,
    args: tuple[Any, ...],
    rngs: Any,
    mutable: Any,
    kwargs: dict[str, Any],
) -> Any:
    """Calls `module.apply` as one region: a pure function, traced and planned."""
    policy, rules, named_scopes = application_of(module)[:3]
    dtypes = of_root(policy, rules, module)
    static = ("method", "capture_intermediates")
    static_kwargs = {name: kwargs.pop(name) for name in static if name in kwargs}

    def run(variables, args, rngs, kwargs):
        output = apply(variables, *args, rngs=rngs, **kwargs, **static_kwargs)
        output, *updates = output if mutable is not False else (output,)
        output = cast_carry(_carry(module, args, kwargs), output, dtypes.output)
        return (output, *updates) if updates else output

    def watch(plan):
        if static_kwargs.get("method") in (None, "__call__"):
            name = original_class(type(module)).__name__
            check_plan(plan, type(module)._leaves, name, application_of(module))

    settings = region_settings(dtypes.compute, dtypes.precision)
    with inside_region(dtypes.compute):
        return run_region(
            run, (variables, args, rngs, kwargs), settings, named_scopes, watch
        )


def _rebuild(cls, fields, name, application, inside):
    return _policied(cls, application, inside)(**fields, name=name)


def _fields(module: nn.Module) -> dict[str, Any]:
    return {
        name: getattr(module, name)
        for name, field in module.__dataclass_fields__.items()
        if field.init and name not in ("parent", "name")
    }


def _policy_children(parent: nn.Module, name: str, value: Any) -> Any:
    """Gives the layers of a bound module the policy of the module around them."""
    if name.startswith("_") or name in ("parent", "scope", "name"):
        return value
    for child in _modules_in(value):
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


def _modules_in(value: Any) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    items = value if isinstance(value, (list, tuple)) else ()
    return [module for item in items for module in _modules_in(item)]


def _scopes(module: nn.Module) -> list[Scope]:
    """The scopes of a bound module and of the modules in its fields."""
    scopes = [] if module.scope is None else [module.scope]
    for value in _fields(module).values():
        for child in _modules_in(value):
            scopes += _scopes(child)
    return scopes


class _Interceptor:
    """What happens on every method call while a module with a policy runs."""

    def __init__(self, application: Application, path: Path, inside: Path):
        self.application = application
        is_bound = path[len(path) - len(inside) :] == inside
        # A layer that was unbound from its model keeps the dtypes that it has there.
        self.root = path[: len(path) - len(inside)] if is_bound else path
        self.unbound_from = () if is_bound else inside
        self.layers: dict[tuple[Path, type], LayerDtypes] = {}
        self.used: set[PolicyRule] = set()
        self.inside: set[int] = set()
        self.leaves: dict[str, Leaf] = {}

    def covers(self, scope: Scope | None) -> bool:
        """Whether a layer belongs to the module that this was made for."""
        while scope is not None:
            if scope.flags.get(_FLAG) == self.application:
                return True
            scope = scope.parent
        return False

    def run(self, module: nn.Module, method: str, call: Callable[[], Any]) -> Any:
        """Calls a method of the module that the policy was applied to."""
        token = _running.set((*_running.get(), self))
        try:
            with contextlib.ExitStack() as stack:
                for scope in _scopes(module):
                    stack.enter_context(self._flagged(scope))
                stack.enter_context(nn.intercept_methods(self))
                output = call()
        finally:
            _running.reset(token)
        # What nn.jit takes from its cache is not seen again, so it is remembered.
        used = type(module)._used_rules  # pyright: ignore[reportAttributeAccessIssue]
        used.update(self.used)
        if method == "__call__" and self._path_in_model(module) == ():
            check_all_used(self.application.rules, used, self._paths())
            self._check_effect(module)
        return output

    def _check_effect(self, module: nn.Module) -> None:
        cls: Any = type(module)
        cls._leaves.update(self.leaves)
        if not cls._is_checked and not _watchers.get():
            cls._is_checked = True
            name = original_class(cls).__name__
            check_leaves(self.leaves, name, self.application)

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        if not self.covers(module.scope):
            return next_fun(*args, **kwargs)
        is_root = self._path_in_model(module) == ()
        if _is_about_layer(module, context.method_name) and not is_root:
            return next_fun(*args, **kwargs)
        dtypes = self._dtypes_of(module)
        adapt, method = self._adapter(module, dtypes), context.method_name
        is_entry = id(module) not in self.inside and method != "setup"
        if is_entry and adapt is adapt_user_layer and self._opens_region(dtypes):
            if not module.is_initializing():
                return self._run_region(module, dtypes, context, args, kwargs)
            with inside_region(dtypes.compute):
                output = self(next_fun, args, kwargs, context)
            return cast_carry(_carry(module, args, kwargs), output, dtypes.output)
        handed = self._handed_down(module, dtypes, adapt)
        explicit = self.application.explicit_dtype
        call = LayerCall(
            module, method, dtypes, explicit, is_entry, next_fun, args, kwargs
        )
        with (
            self._flagged(module.scope),
            self._entered(module),
            attributes(module, handed),
            self._named(module, dtypes) if is_entry else contextlib.nullcontext(),
        ):
            output = adapt(call)
            if is_entry:
                self._note(call)
                self._show(call, output)
        is_flax = is_entry and adapt is adapt_flax_layer
        return as_written(call, output) if is_flax else output

    def _note(self, call: LayerCall) -> None:
        """Remembers a layer of Flax, to tell whether the policy has an effect."""
        module, kind = call.module, kind_of(call.module)
        if not is_leaf(module) or kind in (None, "norm"):
            return
        origin = origin_in(module, call.dtypes, call.explicit_dtype)
        dtype = call.dtypes.compute
        if origin is Origin.AUTHOR:
            dtype = jnp.dtype(getattr(module, "dtype"))  # noqa: B009
        params = module.variables.get("params", {})
        size = sum(jnp.size(x) for x in jax.tree.leaves(params))
        name = original_class(type(module)).__name__
        self.leaves[self._path_string(module)] = Leaf(name, origin, dtype, size)

    def _show(self, call: LayerCall, output: Any) -> None:
        for watcher in _watchers.get():
            origin = origin_in(call.module, call.dtypes, call.explicit_dtype)
            path = self._path_string(call.module)
            watcher(Visit(path, call.module, call.dtypes, origin, output))

    def _opens_region(self, dtypes: LayerDtypes) -> bool:
        return self.application.own_code == "autocast" and opens_region(dtypes.compute)

    def _run_region(self, module, dtypes, context, args, kwargs) -> Any:
        """Runs a method whose own operations are planned, and those of layers inside.

        The method is traced by a lifted transformation, as by `nn.remat`.
        """

        def finish(output):
            return cast_carry(_carry(module, args, kwargs), output, dtypes.output)

        def watch(plan):
            is_whole = self._path_in_model(module) == ()
            if is_whole and context.method_name == "__call__":
                name = original_class(type(module)).__name__
                check_plan(plan, self.leaves, name, self.application)

        method = context.orig_method.func
        lifted = planned_method(
            method,
            region_settings(dtypes.compute, dtypes.precision),
            self.application.named_scopes,
            finish,
            watch,
            functools.partial(self._around_rules, dtypes.compute),
        )
        with inside_region(dtypes.compute):
            return lifted(module, *args, **kwargs)

    @contextlib.contextmanager
    def _around_rules(self, dtype: np.dtype) -> Iterator[None]:
        token = _running.set((*_running.get(), self))
        try:
            with nn.intercept_methods(self), inside_region(dtype):
                yield
        finally:
            _running.reset(token)

    def _handed_down(
        self, module: nn.Module, dtypes: LayerDtypes, adapt: Any
    ) -> dict[str, Any]:
        """The fields in which a user's layer hands its dtypes down."""
        if self.application.explicit_dtype == "keep":
            return {}
        is_flax = any(is_flax_layer(cls) for cls in type(module).__mro__)
        if is_flax and self._path_in_model(module) != ():
            return {}
        is_norm = kind_of(module) == "norm"
        compute = dtypes.output if is_norm else dtypes.compute
        return handed_down(fields_of(module), compute, dtypes.params)

    def _adapter(
        self, module: nn.Module, dtypes: LayerDtypes
    ) -> Callable[[LayerCall], Any]:
        is_root = self._path_in_model(module) == ()
        named = dtypes.rule is not None and not dtypes.rule.yields_to_author
        if is_transparent(module) and not (is_root or named):
            return adapt_transparent_layer
        return adapt_flax_layer if is_leaf(module) else adapt_user_layer

    def _named(self, module: nn.Module, dtypes: LayerDtypes) -> Any:
        """A name scope for a layer of a known kind."""
        origin = origin_in(module, dtypes, self.application.explicit_dtype)
        dtype = dtypes.compute
        if origin is Origin.AUTHOR:
            dtype = getattr(module, "dtype")  # noqa: B009  only layers of Flax have one
        name = scope_of(module, dtype) if self.application.named_scopes else None
        return contextlib.nullcontext() if name is None else jax.named_scope(name)

    def _dtypes_of(self, module: nn.Module) -> LayerDtypes:
        key = (module.path, original_class(type(module)))
        if key not in self.layers:
            policy, rules = self.application[:2]
            if self._path_in_model(module) == () and not self.layers:
                dtypes = of_root(policy, rules, module)
            else:
                path = self._path_string(module)
                dtypes = of_layer(self._enclosing(module), rules, path, module)
            self.layers[key] = dtypes
            if dtypes.rule is not None:
                self.used.add(dtypes.rule)
        return self.layers[key]

    def _enclosing(self, module: nn.Module) -> LayerDtypes:
        parent = module.parent
        if isinstance(parent, nn.Module) and self.root == parent.path[: len(self.root)]:
            return self._dtypes_of(parent)
        # In a lifted transformation, a clone has a scope in place of a parent.
        around = [
            key
            for key in self.layers
            if module.path[: len(key[0])] == key[0] and key[0] != module.path
        ]
        if around:
            return self.layers[max(around, key=lambda key: len(key[0]))]
        policy, rules = self.application[:2]
        dtypes = of_root(policy, rules, None)
        for end in range(1, len(self.unbound_from)):
            path = "/".join(self.unbound_from[:end])
            dtypes = of_layer(dtypes, rules, path, None)
        return dtypes

    def _path_in_model(self, module: nn.Module) -> Path:
        return self.unbound_from + module.path[len(self.root) :]

    def _path_string(self, module: nn.Module) -> str:
        return "/".join(self._path_in_model(module))

    def _paths(self) -> set[str]:
        return {"/".join(path[len(self.root) :]) for path, _ in self.layers}

    @contextlib.contextmanager
    def _flagged(self, scope: Scope) -> Iterator[None]:
        flags = scope.flags
        # What runs in a region is traced otherwise than what does not.
        flag = {_FLAG: self.application, _REGION_FLAG: region_dtype()}
        scope.flags = freeze({**flags, **flag})
        try:
            yield
        finally:
            scope.flags = flags

    @contextlib.contextmanager
    def _entered(self, module: nn.Module) -> Iterator[None]:
        from_outside = id(module) not in self.inside
        self.inside.add(id(module))
        try:
            yield
        finally:
            if from_outside:
                self.inside.discard(id(module))


def _is_about_layer(module: nn.Module, method: str) -> bool:
    """Whether a function of the user's is run as if it were a method of Flax's layer.

    As the functions are that `nn.vjp` and `nn.custom_vjp` are given.
    """
    is_flax = any(is_flax_layer(cls) for cls in type(module).__mro__)
    return is_flax and not hasattr(type(module), method)


def _carry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    is_cell = isinstance(module, nn.RNNCellBase)
    return carry_of(args, kwargs) if is_cell else None


_watchers: contextvars.ContextVar[tuple[Callable[[Visit], None], ...]] = (
    contextvars.ContextVar("watchers", default=())
)


@contextlib.contextmanager
def watch(watcher: Callable[[Visit], None]) -> Iterator[None]:
    """Shows every call of a layer to a function, which changes nothing."""
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)
