"""Makes a training step of a model that is known by its import path.

The model may be a class of Flax linen, of Flax nnx or of Hugging Face's Flax models, or
a function. Its weights are abstract: nothing is allocated, downloaded or computed.
"""

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp._jaxpr.arguments import open_scopes
from jaxmp.casting import autocast
from jaxmp.cli._expressions import Call, read_config, read_inputs
from jaxmp.errors import InvalidStep


class Inputs:
    """What a model is called with, apart from its arrays.

    Attributes:
      call: with abstract arrays.
      arrays: these arrays.
    """

    def __init__(self, call: Call):
        self.call = call
        self._leaves, self._tree = jax.tree.flatten((call.args, dict(call.kwargs)))
        self._places = [
            i
            for i, leaf in enumerate(self._leaves)
            if isinstance(leaf, jax.ShapeDtypeStruct)
        ]
        self.arrays = [self._leaves[i] for i in self._places]

    def fill(self, arrays: Sequence[Any]) -> Call:
        """The call with other arrays in the places of its own."""
        leaves = list(self._leaves)
        for place, array in zip(self._places, arrays, strict=True):
            leaves[place] = array
        return Call(*jax.tree.unflatten(self._tree, leaves))


class Model(NamedTuple):
    """A model, apart from its numbers.

    Attributes:
      call: takes the parameters, the other state, and what it is called with; returns
        the outputs and the new state.
      params: what is differentiated; abstract.
      state: what is not, such as statistics and random keys; abstract.
      inputs: what it is called with.
    """

    call: Callable[[Any, Any, Call], tuple[Any, Any]]
    params: Any
    state: Any
    inputs: Inputs


def is_model(target: Any) -> bool:
    """Whether a target is a Flax class or module, and not a function."""
    base = _unwrapped(target)
    return inspect.isclass(base) or _kind(base) is not None


def make_model_step(
    target: Any, name: str, config: str, inputs: str, names: Mapping[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    """Makes a training step of a model: its loss and the gradients.

    A single number that the model returns, alone or first in a tuple, is the loss;
    otherwise the mean of the squares of its outputs is, which needs no labels.

    Args:
      target: a class, a Flax module or a function.
      name: what the user calls it.
      config: of `--config`; may be empty.
      inputs: of `--inputs`.
      names: what these two may use, besides those of the target's own module.

    Returns:
      A function of the policy that returns `(step, params, state, inputs)`; without a
      policy, the step is as its author wrote it.

    Raises:
      InvalidStep: if the model cannot be made, or cannot be called with its inputs.
    """
    module = sys.modules.get(getattr(_unwrapped(target), "__module__", ""))
    names = {**({} if module is None else vars(module)), **names}
    given = read_config(config, names)
    called = read_inputs(inputs, names)
    try:
        model = _make(target, name, given, called)
        _check(model, name)
    except InvalidStep:
        raise
    except Exception as error:
        raise InvalidStep(
            f"{name} cannot be called with --inputs {str(called)!r}. "
            f"{type(error).__name__}: {str(error).strip()}"
        ) from error

    def step_of_policy(policy: Any = None) -> tuple[Any, ...]:
        loss_fn = functools.partial(_loss, model)
        loss = loss_fn if policy is None else autocast(loss_fn, policy)

        def training_step(params: Any, state: Any, inputs: Any) -> Any:
            return jax.value_and_grad(loss, has_aux=True)(params, state, inputs)

        return training_step, model.params, model.state, model.inputs.arrays

    return step_of_policy


def _make(target: Any, name: str, given: Call, called: Call) -> Model:
    base = _unwrapped(target)
    kind = _kind(base)
    if kind is None and inspect.isclass(base):
        raise InvalidStep(f"{name} is a class, but not a Flax model. {_instead(base)}")
    if kind == "hugging face":
        return _hugging_face(base, name, given, Inputs(called))
    if kind is None and (made := _made_by(target, given)) is not None:
        target, given, kind = made, Call(), _kind(made)
    if kind is None:
        return _function(target, name, given, called)
    make = _linen if kind == "linen" else _nnx
    return make(target, name, given, Inputs(called))


def _unwrapped(target: Any) -> Any:
    while isinstance(target, functools.partial):
        target = target.func
    return target


def _kind(base: Any) -> str | None:
    """Which kind of Flax model a class, or an instance of one, is."""
    cls = base if inspect.isclass(base) else type(base)
    # Not by hasattr: classes of Transformers whose library is missing raise there.
    if any("module_class" in vars(parent) for parent in cls.__mro__):
        return "hugging face" if inspect.isclass(base) else None
    for kind in ("linen", "nnx"):
        library = sys.modules.get(f"flax.{kind}")
        if library is not None and issubclass(cls, library.Module):
            return kind
    return None


def _instead(cls: type) -> str:
    library = sys.modules.get(cls.__module__.partition(".")[0])
    flax = f"Flax{cls.__name__}"
    if library is not None and hasattr(library, flax):
        return f"Its Flax class is {library.__name__}:{flax}."
    return (
        "Name a class of flax.linen, of flax.nnx or of Hugging Face's Flax models, or "
        "a function such as loss(params, x)."
    )


def _made_by(function: Any, given: Call) -> Any:
    """The Flax module that a function makes of `--config` alone, or None."""
    try:
        inspect.signature(function).bind(*given.args, **given.kwargs)
        made = function(*given.args, **given.kwargs)
    except Exception:
        return None
    return made if _kind(made) is not None else None


def _construct(make: Callable[[], Any], target: Any, name: str, given: Call) -> Any:
    """What a class makes of `--config`; a module that is made already as it is."""
    if not inspect.isclass(_unwrapped(target)):
        if given.args or given.kwargs:
            raise InvalidStep(
                f"{name} is a module that is made already, so --config has no use. "
                "Leave it out, or name the class."
            )
        return target
    try:
        return make()
    except Exception as error:
        raised = f"{name}({given}) raised {type(error).__name__}: {error}"
        is_call = isinstance(error, TypeError) and "__init__" in str(error)
        raise InvalidStep(
            f"{raised}\n{_takes(target, name)}" if is_call else raised
        ) from error


def _parameters(cls: Any) -> Mapping[str, inspect.Parameter]:
    # Not of the class: nnx classes have a metaclass that takes anything.
    return inspect.signature(_unwrapped(cls).__init__).parameters


def _takes(target: Any, name: str) -> str:
    """What `--config` may give."""
    hidden = {"self", "parent", "name", "rngs"}
    shown = [
        p.name if p.default is p.empty else f"{p.name}=..."
        for p in _parameters(target).values()
        if p.name not in hidden and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    return f"{name} takes: {', '.join(shown) or 'nothing'}. Write it in --config."


def _linen(target: Any, name: str, given: Call, inputs: Inputs) -> Model:
    module = _construct(
        lambda: target(*given.args, **given.kwargs), target, name, given
    )
    key = _abstract_key()

    def init(key: Any, arrays: Any) -> Any:
        call = inputs.fill(arrays)
        return module.init(key, *call.args, **call.kwargs)

    variables = dict(jax.eval_shape(init, key, inputs.arrays))
    params = variables.pop("params", {})

    def call(params: Any, state: Any, call: Call) -> tuple[Any, Any]:
        return module.apply(
            {"params": params, **state["variables"]},
            *call.args,
            **call.kwargs,
            rngs={"params": state["key"]},
            mutable=list(state["variables"]),
        )

    return Model(call, params, {"variables": variables, "key": key}, inputs)


def _nnx(target: Any, name: str, given: Call, inputs: Inputs) -> Model:
    nnx: Any = sys.modules["flax.nnx"]

    def make() -> Any:
        needs_rngs = "rngs" in _parameters(target)
        rngs = {"rngs": nnx.Rngs(0)} if needs_rngs else {}
        return target(*given.args, **{**rngs, **given.kwargs})

    module = _construct(lambda: nnx.eval_shape(make), target, name, given)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def call(params: Any, state: Any, call: Call) -> tuple[Any, Any]:
        module = nnx.merge(graphdef, params, state, copy=True)
        open_scopes([module])
        outputs = module(*call.args, **call.kwargs)
        return outputs, nnx.state(module, nnx.Not(nnx.Param))

    return Model(call, _abstract(params), _abstract(rest), inputs)


def _hugging_face(cls: Any, name: str, given: Call, inputs: Inputs) -> Model:
    model = _construct(lambda: _of_config(cls, name, given), cls, name, given)
    takes = inspect.signature(model.__call__).parameters
    params, variables = model.params_shape_tree, {}
    has_statistics = "batch_stats" in params
    if has_statistics:
        variables = {k: v for k, v in params.items() if k != "params"}
        params = params["params"]

    def call(params: Any, state: Any, call: Call) -> tuple[Any, Any]:
        if has_statistics:
            params = {"params": params, **state["variables"]}
        options = {"train": True, "dropout_rng": state["key"]}
        options = {k: v for k, v in options.items() if k in takes} | dict(call.kwargs)
        outputs = model(*call.args, params=params, **options)
        trains = has_statistics and options.get("train", False)
        return outputs if trains else (outputs, ())

    return Model(call, params, {"variables": variables, "key": _abstract_key()}, inputs)


def _of_config(cls: Any, name: str, given: Call) -> Any:
    """A model without weights. What its class does not take is for its config."""
    if given.args:
        raise TypeError(
            "write the settings of the config by name, such as num_hidden_layers=2"
        )
    own = set(_parameters(cls)) - {"config", "_do_init"}
    options = {k: v for k, v in given.kwargs.items() if k in own}
    settings = {k: v for k, v in given.kwargs.items() if k not in own}
    config_class = cls.config_class
    known = {*config_class().to_dict(), *config_class.attribute_map}
    # A config keeps whatever it is given, so a misspelt name would have no effect.
    for setting in settings:
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=3)
            meant = f" Did you mean {', '.join(near)}?" if near else ""
            parent = config_class.__mro__[1]
            own = config_class().to_dict().keys() - parent().to_dict().keys()
            raise TypeError(
                f"{config_class.__name__} has no {setting!r}.{meant} Its own settings: "
                f"{', '.join(sorted(own))}."
            )
    return cls(config_class(**settings), **options, _do_init=False)


def _function(function: Any, name: str, given: Call, called: Call) -> Model:
    bound = functools.partial(function, *given.args, **given.kwargs)
    args, kwargs = list(called.args), dict(called.kwargs)
    by_name = "" if args else next(iter(kwargs))
    params = kwargs.pop(by_name) if by_name else args.pop(0)
    if not _floating(params):
        raise InvalidStep(
            f"The first of --inputs is what {name} is differentiated by, and it holds "
            "no floating-point array. Write the parameters first: "
            "\"{'w': f32[256,128], 'b': f32[128]}, f32[8,256]\"."
        )

    def call(params: Any, state: Any, call: Call) -> tuple[Any, Any]:
        if by_name:
            return bound(**{by_name: params}, **call.kwargs), state
        return bound(params, *call.args, **call.kwargs), state

    return Model(call, params, (), Inputs(Call(tuple(args), kwargs)))


def _check(model: Model, name: str) -> None:
    """Calls a model without computing anything."""
    if not _floating(model.params):
        raise InvalidStep(f"{name} has no parameters, so there is nothing to train.")
    outputs, _ = jax.eval_shape(
        lambda params, state, arrays: model.call(
            params, state, model.inputs.fill(arrays)
        ),
        model.params,
        model.state,
        model.inputs.arrays,
    )
    if not _floating(outputs):
        raise InvalidStep(
            f"{name} returns no floating-point array, so there is nothing to "
            "differentiate. Name a function that returns a loss."
        )


def _loss(model: Model, params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
    """The loss that a model returns, or else the mean of the squares of its outputs."""
    outputs, state = model.call(params, state, model.inputs.fill(inputs))
    first = outputs[0] if isinstance(outputs, tuple) and outputs else outputs
    if getattr(first, "shape", None) == () and _floating(first):
        return first, state
    floating = [x for x in jax.tree.leaves(outputs) if _floating(x)]
    squares = (jnp.mean(jnp.square(x.astype(jnp.float32))) for x in floating)
    return functools.reduce(jnp.add, squares), state


def _floating(tree: Any) -> bool:
    return any(
        jnp.issubdtype(x.dtype, jnp.floating)
        for x in jax.tree.leaves(tree)
        if hasattr(x, "dtype")
    )


def _abstract_key() -> Any:
    return jax.eval_shape(jax.random.key, 0)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
