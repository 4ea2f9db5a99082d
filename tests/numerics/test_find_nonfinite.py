import pytest

from jaxmp.numerics import find_nonfinite

from .faults import FAULTS
from .healthy import HEALTHY, ZOO, network_of_the_zoo

every_fault = pytest.mark.parametrize("fault", FAULTS, ids=str)


@every_fault
# JAX says so itself where a constant does not fit; it does not say what comes of it.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_planted_fault_is_found(fault):
    fn, args, options = fault.make()
    found = find_nonfinite(fn, *args, **options)
    assert found, found
    told = str(found)
    assert (found.primitive, found.line) == (fault.primitive, fault.line), told
    assert found.line is None or found.file == __file__.replace(
        "test_find_nonfinite", "faults"
    )
    assert fault.cause in found.cause, told
    assert fault.repair in found.repair, told
    assert found.kind == fault.kind, told
    assert found.is_backward == fault.is_backward, told
    assert found.iterations == fault.iterations, told
    assert found.path.endswith(fault.path), told


@pytest.mark.parametrize("make", HEALTHY, ids=lambda make: make.__name__)
def test_healthy_program_raises_no_alarm(make):
    fn, args, options = make()
    found = find_nonfinite(fn, *args, **options)
    assert not found, str(found)
    assert str(found).startswith("Everything that comes out is finite")


@pytest.mark.slow
@pytest.mark.parametrize("model", ZOO, ids=str)
def test_networks_of_the_zoo_raise_no_alarm(model):
    fn, args, options = network_of_the_zoo(model)
    found = find_nonfinite(fn, *args, **options)
    assert not found, str(found)


def test_the_catalogues_are_long_enough():
    assert len(FAULTS) >= 30
    assert len(HEALTHY) >= 30
