"""Reads what a call is given, as Python writes it: `f32[8,512], train=False`."""

import ast
import difflib
import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp.errors import InvalidStep

_SHORT = {
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "f64": "float64",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
    "bool": "bool",
    "int": "int32",
    "float": "float32",
}
_USUAL = {
    "jax": "jax",
    "jnp": "jax.numpy",
    "np": "numpy",
    "nn": "flax.linen",
    "nnx": "flax.nnx",
    "optax": "optax",
}
"""Modules that are there by the names that everybody gives them."""


class Call(NamedTuple):
    """What a call is given.

    Attributes:
      args: by position.
      kwargs: by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}

    def __str__(self) -> str:
        named = [f"{name}={_shown(x)}" for name, x in self.kwargs.items()]
        return ", ".join([*map(_shown, self.args), *named])


class _DType:
    """Stands for a dtype in front of a shape: `f32[8, 512]` makes an abstract array."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, shape: int | tuple[int, ...]) -> jax.ShapeDtypeStruct:
        sizes = shape if isinstance(shape, tuple) else (shape,)
        if not all(isinstance(n, int) and n >= 0 for n in sizes):
            raise TypeError(f"the sizes of an array are whole numbers, not {sizes}")
        if self.name == "key":
            dtype = jax.eval_shape(jax.random.key, 0).dtype
        else:
            dtype = jax.dtypes.canonicalize_dtype(jnp.dtype(self.name))
        return jax.ShapeDtypeStruct(sizes, dtype)

    def __repr__(self) -> str:
        return self.name


_DTYPES = {
    name: _DType(meant)
    for short, meant in [*_SHORT.items(), ("key", "key")]
    for name in (short, meant)
}


def read_config(text: str, names: Mapping[str, Any]) -> Call:
    """Reads `--config`: Python values.

    Args:
      text: such as `"features=64, dtype=jnp.bfloat16"`.
      names: what the text may use, besides the usual modules.

    Raises:
      InvalidStep: if it cannot be read.
    """
    return _read("--config", text, names, "n_layer=2, activation=nn.gelu")


def read_inputs(text: str, names: Mapping[str, Any]) -> Call:
    """Reads `--inputs`: dtypes with shapes, and Python values.

    Args:
      text: such as `"i32[8,128], train=False"`.
      names: what the text may use, besides the dtypes and the usual modules.

    Raises:
      InvalidStep: if it cannot be read, or holds no array.
    """
    # A scalar is written as JAX prints it; Python has no empty brackets.
    scalars = re.sub(rf"\b({'|'.join(_DTYPES)})\[\s*\]", r"\1[()]", text)
    example = "i32[8,128], train=False"
    call = _read("--inputs", scalars, {**names, **_DTYPES}, example)
    leaves = jax.tree.leaves((call.args, dict(call.kwargs)))
    for leaf in leaves:
        if isinstance(leaf, _DType):
            raise InvalidStep(
                f"--inputs {text!r} has {leaf} without a shape. Write {leaf}[8,128], "
                f"or {leaf}[] for a single number."
            )
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise InvalidStep(
            f"--inputs {text!r} holds no array. Write a dtype and a shape for each: "
            f"{example!r}."
        )
    return call


def _read(flag: str, text: str, names: Mapping[str, Any], example: str) -> Call:
    try:
        tree = ast.parse(f"_call({text})", mode="eval")
        if not isinstance(tree.body, ast.Call) or len(ast.dump(tree.body.func)) > 60:
            raise SyntaxError("unmatched brackets")
    except (SyntaxError, ValueError) as error:
        why = error.msg if isinstance(error, SyntaxError) else error
        raise InvalidStep(
            f"{flag} {text!r} cannot be read: {why}. Write what stands between the "
            f"brackets of a call: {example!r}."
        ) from error
    known = {**_usual(tree), **names}
    try:
        args, kwargs = eval(
            compile(tree, flag, "eval"),
            {**known, "_call": lambda *args, **kwargs: (args, kwargs)},
        )
    except NameError as error:
        name = error.name or ""
        dtypes = ", and dtypes such as f32, bf16, i32" if flag == "--inputs" else ""
        raise InvalidStep(
            f"{flag} {text!r}: there is no {name!r}.{_meant(name, known)} Known are "
            f"the names of the target's module, {', '.join(_USUAL)}{dtypes}."
        ) from error
    except Exception as error:
        raise InvalidStep(
            f"{flag} {text!r} raised {type(error).__name__}: {error}. Write what "
            f"stands between the brackets of a call: {example!r}."
        ) from error
    return Call(args, kwargs)


def _usual(tree: ast.AST) -> dict[str, Any]:
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return {name: importlib.import_module(_USUAL[name]) for name in used & set(_USUAL)}


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [*known, *_USUAL], n=2)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _shown(x: Any) -> str:
    if isinstance(x, jax.ShapeDtypeStruct):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{k!r}: {_shown(v)}" for k, v in x.items()) + "}"
    if isinstance(x, (list, tuple)):
        return f"{type(x).__name__}({', '.join(map(_shown, x))})"
    return repr(x)
