"""What happens on every method call while a linen module with a policy runs."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import Scope, freeze
from flax.linen.module import InterceptorContext

from jaxmp._tree import FLOAT32
from jaxmp.casting.plan.plan import JaxprPlan
from jaxmp.casting.quantized.formats import warn_if_nothing
from jaxmp.modules._casts import carry_of, cast_carry
from jaxmp.modules._effect import Leaf, check_leaves, check_plan
from jaxmp.modules._handed_down import HandedDown, fields_of, handed_down, hands_down
from jaxmp.modules._layers import (
    Application,
    LayerDtypes,
    Origin,
    check_all_used,
    is_of_flax,
    kind_of,
    named,
    of_layer,
    of_root,
    original_class,
    scope_of,
)
from jaxmp.modules._linen_fields import attributes, scopes_of
from jaxmp.modules._linen_layers import (
    LayerCall,
    adapt_flax_layer,
    adapt_transparent_layer,
    adapt_user_layer,
    as_written,
    is_leaf,
    is_transparent,
    origin_in,
)
from jaxmp.modules._linen_region import planned_method
from jaxmp.modules._own_code import (
    as_written_settings,
    inside_region,
    is_planned,
    kept_as_written,
    opens_region,
    own_code_settings,
    region,
    region_dtype,
)
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


running: contextvars.ContextVar[tuple["Interceptor", ...]] = contextvars.ContextVar(
    "interceptors", default=()
)


class Interceptor:
    """What happens on every method call while a module with a policy runs."""

    def __init__(self, application: Application, path: Path, inside: Path) -> None:
        self.application = application
        is_bound = path[len(path) - len(inside) :] == inside
        # A layer that was unbound from its model keeps the dtypes that it has in it.
        self.root = path[: len(path) - len(inside)] if is_bound else path
        self.unbound_from = () if is_bound else inside
        self.layers: dict[tuple[Path, type], LayerDtypes] = {}
        self.used: set[PolicyRule] = set()
        self.inside: set[int] = set()
        self.leaves: dict[str, Leaf] = {}
        self.handing: set[Path] = set()
        self.covers_all = False

    def covers(self, scope: Scope | None) -> bool:
        """Whether a layer belongs to the module that this was made for."""
        if self.covers_all:
            return True
        while scope is not None:
            if scope.flags.get(_FLAG) == self.application:
                return True
            scope = scope.parent
        return False

    def run(self, module: nn.Module, method: str, call: Callable[[], Any]) -> Any:
        """Calls a method of the module that the policy was applied to."""
        token = running.set((*running.get(), self))
        try:
            with contextlib.ExitStack() as stack:
                for scope in scopes_of(module):
                    stack.enter_context(self._flagged(scope))
                stack.enter_context(nn.intercept_methods(self))
                output = call()
        finally:
            running.reset(token)
        # Layers that nn.jit takes from its cache are not seen again: remember them.
        used = type(module)._used_rules  # pyright: ignore[reportAttributeAccessIssue]
        used.update(self.used)
        if method == "__call__" and self._path_in_model(module) == ():
            check_all_used(self.application.rules, used, self._paths())
            self._check_effect(module)
        return output

    def _check_effect(self, module: nn.Module) -> None:
        cls: Any = type(module)
        cls._leaves.update(self.leaves)
        if not _watchers.get():
            name = original_class(cls).__name__
            check_leaves(self.leaves, name, self.application, cls._said)

    def __call__(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        module: Any = context.module
        if not self.covers(module.scope):
            return next_fun(*args, **kwargs)
        if not hasattr(type(module), context.method_name):
            # A function that is run like a method, as `nn.vjp` runs its argument. The
            # methods that it calls come here in turn.
            with self._flagged(module.scope):
                return next_fun(*args, **kwargs)
        dtypes = self._dtypes_of(module)
        adapt, method = self._adapter(module, dtypes), context.method_name
        is_entry = id(module) not in self.inside and method != "setup"
        if is_entry and adapt is adapt_user_layer and self._opens_region(dtypes):
            if not module.is_initializing():
                return self._run_region(module, dtypes, context, args, kwargs)
            with inside_region(dtypes.compute):
                output = self(next_fun, args, kwargs, context)
            return cast_carry(carry_of(module, args, kwargs), output, dtypes.output)
        is_planned_later = is_planned() or module.is_initializing()
        if is_entry and self.application.needs_plan and not is_planned_later:
            return self._run_as_written(module, context, args, kwargs)
        handed = self._handed_down(module, dtypes)
        call = LayerCall(
            module,
            method,
            dtypes,
            self.application.explicit_dtype,
            self._is_handed(module),
            is_entry,
            next_fun,
            args,
            kwargs,
        )
        with (
            self._flagged(module.scope),
            self._entered(module),
            attributes(module, handed),
            self._named(call) if is_entry else contextlib.nullcontext(),
            named(self.application.gradients_scope(dtypes)),
            named(self.application.matmul_scope(module, dtypes)),
        ):
            output = adapt(call)
            if is_entry:
                self._note(call)
                self._show(call, output)
        is_flax = is_entry and adapt is adapt_flax_layer
        return as_written(call, output) if is_flax else output

    def _note(self, call: LayerCall) -> None:
        """Remembers a layer of Flax, to see whether the policy has an effect."""
        module, kind = call.module, kind_of(call.module)
        if not is_leaf(module) or kind in (None, "norm"):
            return
        origin, dtype = origin_in(call), self._computes(call)
        params = module.variables.get("params", {})
        size = sum(jnp.size(x) for x in jax.tree.leaves(params))
        name = original_class(type(module)).__name__
        self.leaves[self._path_string(module)] = Leaf(name, origin, dtype, size)

    def _show(self, call: LayerCall, output: Any) -> None:
        for watcher in _watchers.get():
            origin = origin_in(call)
            path = self._path_string(call.module)
            watcher(Visit(path, call.module, call.dtypes, origin, output))

    def _opens_region(self, dtypes: LayerDtypes) -> bool:
        return self.application.own_code == "autocast" and opens_region(dtypes.compute)

    def _run_region(
        self,
        module: nn.Module,
        dtypes: LayerDtypes,
        context: InterceptorContext,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a method in a region: its operations, and those of layers inside.

        The method is traced by a lifted transformation, as `nn.remat` traces it.
        """

        def finish(output: Any) -> Any:
            return cast_carry(carry_of(module, args, kwargs), output, dtypes.output)

        def watch(plan: JaxprPlan) -> None:
            is_whole = self._path_in_model(module) == ()
            if is_whole and context.method_name == "__call__":
                name = original_class(type(module)).__name__
                check_plan(plan, self.leaves, name, self.application)

        settings = own_code_settings(self.application, dtypes)
        assert settings is not None
        bound: Any = context.orig_method
        lifted = planned_method(
            bound.func,
            settings,
            self.application.named_scopes,
            finish,
            watch,
            functools.partial(self.around_rules, dtypes.compute),
        )
        with region(dtypes.compute):
            return lifted(module, *args, **kwargs)

    def _run_as_written(
        self,
        module: nn.Module,
        context: InterceptorContext,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a method that no region is around, for what only a plan can do."""

        def watch(plan: JaxprPlan) -> None:
            if self._path_in_model(module) == () and context.method_name == "__call__":
                name = original_class(type(module)).__name__
                warn_if_nothing(plan, self.application.policy.quantize, name)

        bound: Any = context.orig_method
        lifted = planned_method(
            bound.func,
            as_written_settings(self.application),
            self.application.named_scopes,
            lambda output: output,
            watch,
            contextlib.nullcontext,
        )
        with kept_as_written():
            return lifted(module, *args, **kwargs)

    @contextlib.contextmanager
    def around_rules(self, dtype: np.dtype) -> Iterator[None]:
        """Covers custom derivative rules, which are traced after the module has run.

        Their scopes are made then, and they call nothing but the module's layers.
        """
        token = running.set((*running.get(), self))
        self.covers_all = True
        try:
            with nn.intercept_methods(self), inside_region(dtype):
                yield
        finally:
            self.covers_all = False
            running.reset(token)

    def _handed_down(self, module: nn.Module, dtypes: LayerDtypes) -> dict[str, Any]:
        """The fields in which a module hands a dtype down, with their new values."""
        if self.application.explicit_dtype == "keep":
            return {}
        is_flax = is_of_flax(type(module))
        if is_flax and self._path_in_model(module) != ():
            return {}
        fields = fields_of(module)
        if hands_down(fields):
            self.handing.add(self._path_in_model(module))
        if self.application.own_code == "autocast":
            return handed_down(fields, HandedDown, FLOAT32)
        is_norm = kind_of(module) == "norm"
        compute = dtypes.output if is_norm else dtypes.compute
        return handed_down(fields, compute, dtypes.params)

    def _is_handed(self, module: nn.Module) -> bool:
        """Whether a module around a layer hands a float32 down."""
        path = self._path_in_model(module)
        return any(path[: len(around)] == around for around in self.handing)

    def _adapter(
        self, module: nn.Module, dtypes: LayerDtypes
    ) -> Callable[[LayerCall], Any]:
        is_root = self._path_in_model(module) == ()
        named = dtypes.rule is not None and not dtypes.rule.yields_to_author
        if is_transparent(module) and not (is_root or named):
            return adapt_transparent_layer
        return adapt_flax_layer if is_leaf(module) else adapt_user_layer

    def _named(self, call: LayerCall) -> Any:
        """A name scope for a layer of a known kind."""
        dtype = self._computes(call)
        is_named = self.application.named_scopes
        return named(scope_of(call.module, dtype) if is_named else None)

    def _computes(self, call: LayerCall) -> np.dtype:
        """The dtype that a layer computes in."""
        module: Any = call.module
        is_kept = origin_in(call) is Origin.AUTHOR
        return jnp.dtype(module.dtype) if is_kept else call.dtypes.compute

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
            self.used.update(dtypes.rules)
        return self.layers[key]

    def _enclosing(self, module: nn.Module) -> LayerDtypes:
        parent = module.parent
        if isinstance(parent, nn.Module) and self.root == parent.path[: len(self.root)]:
            return self._dtypes_of(parent)
        # In a lifted transformation, a clone has a scope instead of a parent.
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
        # A module is traced differently inside a region and outside.
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


_watchers: contextvars.ContextVar[tuple[Callable[[Visit], None], ...]] = (
    contextvars.ContextVar("watchers", default=())
)


@contextlib.contextmanager
def watch(watcher: Callable[[Visit], None]) -> Iterator[None]:
    """Calls a function with every visit of a layer."""
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)
