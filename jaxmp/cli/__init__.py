"""The command line: `python -m jaxmp` or `jaxmp`.

`doctor` looks at the machine, `policy` explains a policy, `report` compiles a step for
machines that are not there, and `audit` finds what computes in the wrong dtype.
"""

from jaxmp.cli._main import main

__all__ = ["main"]
