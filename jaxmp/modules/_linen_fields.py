"""The fields of linen modules: read, set for a while, and the modules in them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax.core import Scope


def has_field(module: nn.Module, name: str) -> bool:
    """Whether the class of a module declares a field of that name."""
    return any(field.name == name for field in dataclasses.fields(module))


def linen_fields(module: nn.Module) -> dict[str, Any]:
    """The fields that a module is made with, by name."""
    return {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.init and field.name not in ("parent", "name")
    }


def modules_in(value: Any) -> list[nn.Module]:
    """The modules in a field: the value itself, or items of it."""
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    items = value if isinstance(value, (list, tuple)) else ()
    return [module for item in items for module in modules_in(item)]


def scopes_of(module: nn.Module) -> list[Scope]:
    """The scopes of a bound module and of the modules in its fields."""
    scopes = [] if module.scope is None else [module.scope]
    for value in linen_fields(module).values():
        for child in modules_in(value):
            scopes += scopes_of(child)
    return scopes


@contextlib.contextmanager
def attributes(module: nn.Module, settings: dict[str, Any]) -> Iterator[None]:
    """Sets attributes of a module, which is frozen, for a while."""
    before = {name: vars(module).get(name, _MISSING) for name in settings}
    for name, value in settings.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                object.__delattr__(module, name)
            else:
                object.__setattr__(module, name, value)


_MISSING = object()
