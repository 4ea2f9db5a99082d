"""Rounding and traffic on XLA's own TPU v5e and H100 compilers.

Prints what each set-up moves, as `examples/benchmarks/optimizer_memory.py` measures it.
"""

import re

import jax
import jax.numpy as jnp
import optax
import optimizer_memory
import pytest

import jaxmp
from jaxmp._transformations.rounding import (
    join_float32,
    round_to_nearest,
    split_float32,
)
from jaxmp.optimizers import master_weights, stochastic_rounding
from jaxmp.report import compile_for

pytestmark = pytest.mark.targets

TARGETS = ["tpu-v5e", "h100"]
every_target = pytest.mark.parametrize("target", TARGETS)

X = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
W = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)


def hlo(target, fun, *args):
    return compile_for(target, fun, *args).as_text()


# What stands for rounding in a compiled program: either the operation, or the integer
# operations that the backend makes of it.
ROUNDING = re.compile(r"reduce-precision\(")


@every_target
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_compiler_keeps_rounding_to_nearest(target, dtype):
    text = hlo(target, lambda x: round_to_nearest(x, dtype), X)
    assert ROUNDING.search(text)
    # The test can fail: the pair of casts in its place is folded away.
    folded = hlo(target, lambda x: x.astype(dtype).astype(jnp.float32), X)
    assert not ROUNDING.search(folded)


@every_target
def test_the_compiler_keeps_the_rounding_of_master_weights(target):
    tx = jaxmp.loss_scaling(master_weights(optax.adamw(1e-3)), "mixed_bfloat16")
    state = jax.eval_shape(tx.init, W)
    assert ROUNDING.search(hlo(target, tx.update, X, state, W))


@every_target
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_compiler_keeps_stochastic_rounding(target, dtype):
    def round_trip(x, key):
        return jaxmp.stochastic_round(x, dtype, key).astype(jnp.float32)

    key = jax.eval_shape(lambda: jax.random.key(0))
    text = hlo(target, round_trip, X, key)
    kept = {"bfloat16": "4294901760", "float16": "4294959104"}[dtype]
    assert f"constant({kept})" in text  # the bits that stay, 0xffff0000 and 0xffffe000
    assert "and(" in text


@every_target
def test_the_compiler_keeps_split_and_join(target):
    def there_and_back(x):
        high, low = split_float32(x)
        return join_float32(high.astype(jnp.bfloat16), low)

    text = hlo(target, there_and_back, X)
    assert "constant(32768)" in text
    assert "and(" in text


@pytest.mark.parametrize(
    "name", ["master_weights(adamw)", "split master_weights(adamw)"]
)
def test_update_traffic_is_the_least_possible(name, capsys):
    """The least: every array read once, gradients twice, every array written once.

    For bfloat16 weights with float32 master and moments that is 18 bytes read (weight
    2, gradient 2 + 2, master 4, moments 8) and 14 written; split, 16 and 12.
    """
    setup = next(x for x in optimizer_memory.setups() if x.name == name)
    accessed, least = optimizer_memory.traffic(setup)
    assert least == pytest.approx(28 if "split" in name else 32, abs=1e-3)
    with capsys.disabled():
        print(f"\n{name}: {accessed:.3f} bytes per parameter, at least {least:.3f}")
    assert accessed <= 1.05 * least


def test_stochastic_rounding_moves_no_more_than_it_must():
    setup = next(
        x for x in optimizer_memory.setups() if x.name == "stochastic_rounding(adamw)"
    )
    accessed, least = optimizer_memory.traffic(setup)
    assert accessed <= 1.05 * least


@every_target
@pytest.mark.parametrize(
    "wrapper",
    [
        master_weights,
        lambda tx: master_weights(tx, split=True),
        lambda tx: stochastic_rounding(tx, seed=0),
    ],
)
def test_an_update_needs_no_memory_of_its_own(target, wrapper):
    compiled = optimizer_memory.compile_scaled(
        wrapper(optax.adamw(1e-3)), "bfloat16", target
    )
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp / optimizer_memory.WEIGHTS.parameters < 0.05
