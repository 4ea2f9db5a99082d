"""What depends on the installed JAX release; today only the oldest one supported."""

import re

import jax

from jaxmp.errors import UnsupportedJaxVersion

OLDEST_JAX = (0, 10, 0)


def check_jax_version(version: str = jax.__version__) -> None:
    """Raises `UnsupportedJaxVersion` unless `version` is at least `OLDEST_JAX`."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise UnsupportedJaxVersion(
            f"jaxmp needs JAX {oldest} or newer, and JAX {version} is installed. "
            f"Update it: pip install --upgrade 'jax>={oldest}'"
        )


check_jax_version()
