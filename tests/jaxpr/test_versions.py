"""Which releases of JAX are supported, and what is said where one cannot be read."""

import pytest

from jaxmp._jaxpr.lowered import kept_arguments
from jaxmp._jaxpr.versions import (
    check_jax_version,
    scan_arity,
    shard_map_arguments,
)
from jaxmp.errors import UnsupportedJaxVersion

VERSIONS = {
    "0.4.30": False,
    "0.9.2": False,
    "0.9.99.dev20260101": False,
    "0.10.0": True,
    "0.10.0rc1": True,
    "0.10.2+local": True,
    "0.12.0.1": True,
    "0.13.0.dev20260801": True,
    "1.0": True,
}


@pytest.mark.parametrize(("version", "supported"), VERSIONS.items())
def test_versions_of_jax(version, supported):
    if supported:
        check_jax_version(version)
        return
    with pytest.raises(UnsupportedJaxVersion, match=version):
        check_jax_version(version)


UNKNOWN = {
    "scan": (lambda: scan_arity({"carried": 2}), r"a scan by \['carried'\]"),
    "shard_map": (
        lambda: shard_map_arguments({"mesh": None}),
        r"a shard_map by \['mesh'\]",
    ),
    "lowered": (lambda: kept_arguments(object()), "keeps lowered programs"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_a_later_jax_does_otherwise_is_named_with_the_repair(name):
    read, words = UNKNOWN[name]
    with pytest.raises(UnsupportedJaxVersion, match=words) as caught:
        read()
    assert "Update jaxmp, or install jax<" in str(caught.value)
