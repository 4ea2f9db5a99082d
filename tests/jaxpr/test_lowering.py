"""What a lowering rule knows of the device that a program is for."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxmp._jaxpr.lowering import device_kind, lowering_for

asking = Primitive("asking")
asking.def_abstract_eval(lambda x: x)
heard: list[str] = []


def lower(context, x):
    heard.append(device_kind(context))
    return [x]


mlir.register_lowering(asking, lower)


@pytest.fixture
def traced():
    heard.clear()
    return jax.jit(lambda x: asking.bind(x) + 1).trace(jnp.ones(3))


def test_a_program_for_this_machine_knows_its_device(traced):
    traced.lower()
    assert heard == [jax.devices()[0].device_kind]


@pytest.mark.cpu
def test_a_program_for_a_machine_elsewhere_knows_what_it_is_told(traced):
    for kind in ("TPU v5 lite", "TPU v6 lite", "TPU v5 lite", ""):
        with lowering_for(kind):
            traced.lower(lowering_platforms=("tpu",))
    assert heard == ["TPU v5 lite", "TPU v6 lite", ""]


def test_a_program_for_several_platforms_knows_none(traced):
    traced.lower(lowering_platforms=("cpu", "tpu"))
    assert set(heard) == {""}
