"""Finds the step that `module:function` names."""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax

from jaxmp.cli._source import check_source
from jaxmp.errors import InvalidStep


def load_function(spec: str) -> Callable[..., Any]:
    """Imports a function.

    Args:
      spec: such as `"examples.train:make_step"` or `"examples/train.py:make_step"`.

    Raises:
      InvalidStep: if the module or the function does not exist.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        package, _, last = spec.rpartition(".")
        is_path = package and not spec.endswith(".py") and ":" not in spec
        such = f"{package}:{last}" if is_path else "train:make_step"
        raise InvalidStep(
            f"{spec!r} does not name a function. Write MODULE:FUNCTION, such as "
            f"{such}, or FILE.py:FUNCTION."
        )
    check_source(module_name, name)
    module = _import(module_name)
    function: Any = module
    for part in name.split("."):
        if not hasattr(function, part):
            names = [name for name in dir(module) if not name.startswith("_")]
            near = difflib.get_close_matches(part, names, n=3)
            meant = f" Did you mean {', '.join(near)}?" if near else ""
            raise InvalidStep(f"{module_name} has no {part!r}.{meant}")
        function = getattr(function, part)
    if not callable(function):
        raise InvalidStep(f"{spec} is {function!r}, which cannot be called.")
    return function


def names_of(spec: str) -> Mapping[str, Any]:
    """The names that an imported module has."""
    module_name = spec.partition(":")[0]
    if module_name.endswith(".py"):
        module_name = _name_of_file(module_name)
    return vars(sys.modules[module_name])


def takes_policy(function: Callable[..., Any]) -> bool:
    """Whether a function that makes a step takes a policy."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "policy" or p.default is p.empty for p in parameters)


def make_step(function: Callable[..., Any], *policy: Any) -> tuple[Any, ...]:
    """Calls a function that makes a step, and checks what it returned.

    Raises:
      InvalidStep: if it raises, or returns anything but `(step, *args)`.
    """
    name = getattr(function, "__name__", function)
    try:
        made = function(*policy)
    except (Exception, SystemExit) as error:
        raise InvalidStep(
            f"{name}({', '.join(map(repr, policy))}) raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, tuple) or not made or not callable(made[0]):
        raise InvalidStep(
            f"{name} returned {type(made).__name__}, not a tuple of the step and its "
            "arguments. Write: return step, params, opt_state, batch"
        )
    return made


def stay_on_cpu() -> None:
    """Leaves accelerators alone where nothing is run, unless the user chose one."""
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


def _import(name: str) -> ModuleType:
    # The folder in which the command is called can be imported from.
    sys.path.insert(0, os.getcwd())
    try:
        if name.endswith(".py"):
            return _import_file(name)
        return importlib.import_module(name)
    except SystemExit as error:
        raise InvalidStep(
            f"{name!r} ends the program while it is imported: sys.exit({error}). Put "
            'what it runs under: if __name__ == "__main__":'
        ) from error
    except Exception as error:
        raise InvalidStep(
            f"{name!r} cannot be imported: {type(error).__name__}: {error}. The folder "
            f"{os.getcwd()} was searched first."
        ) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(os.getcwd())


def _import_file(path: str) -> ModuleType:
    name = _name_of_file(path)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _name_of_file(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
