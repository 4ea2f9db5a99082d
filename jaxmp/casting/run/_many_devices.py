"""What is worth doing only in a program for several devices.

How many devices a program is for shows when it is lowered, not when it is traced. So
these are primitives, and on one device nothing is left of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxmp._jaxpr.lowering import device_count
from jaxmp._jaxpr.types import Array
from jaxmp.casting.run._identity import as_barrier, as_nothing

_apart = Primitive("sum_apart")


def sum_apart(x: jax.Array) -> jax.Array:
    """Keeps a sum, and the gradient of what passes here, apart from other sums.

    XLA turns the rows that are added up for a table, plus the table's gradient from a
    matmul, into rows that are added to that gradient. On several devices the gradient
    is then reduced, gathered again and reduced a second time, in float32: on eight v5e
    chips that made a tied embedding move three times as many bytes.
    """
    return _apart.bind(x)


def one_or_many(
    one: Callable[..., Array], many: Callable[..., Array], *args: Array
) -> Array:
    """`one(*args)` in a program for one device, `many(*args)` in one for several.

    Both have to return the same values. Neither is differentiated.
    """
    return _choose(one, many, args)


def _identity(x: jax.Array) -> jax.Array:
    return x


_apart.def_impl(_identity)
_apart.def_abstract_eval(_identity)
ad.deflinear2(_apart, lambda cotangent, _: [_apart.bind(cotangent)])
batching.defvectorized(_apart)


def _lower_apart(context: Any, x: Any) -> Any:
    return (as_barrier if device_count(context) > 1 else as_nothing)(context, x)


mlir.register_lowering(_apart, _lower_apart)

_choice = Primitive("one_or_many_devices")


def _run_one(*args: Array, one: Callable[..., Array], many: Any, aval: Any) -> Array:
    return one(*args)


def _choose(
    one: Callable[..., Array], many: Callable[..., Array], args: Sequence[Array]
) -> Array:
    # Arrays show where they live, and in a shard_map whether devices differ.
    aval = jax.make_jaxpr(one)(*args).out_avals[0]
    return _choice.bind(*args, one=one, many=many, aval=aval)


def _batch_choice(
    args: Sequence[Any], axes: Sequence[Any], *, one: Any, many: Any, aval: Any
) -> tuple[Any, int]:
    one, many = (jax.vmap(f, in_axes=tuple(axes)) for f in (one, many))
    return _choose(one, many, args), 0


def _lower_choice(context: Any, *args: Any, one: Any, many: Any, aval: Any) -> Any:
    function = many if device_count(context) > 1 else one
    return mlir.lower_fun(function, multiple_results=False)(context, *args)


_choice.def_impl(_run_one)
_choice.def_abstract_eval(lambda *_, aval, **__: aval)
batching.primitive_batchers[_choice] = _batch_choice
mlir.register_lowering(_choice, _lower_choice)
