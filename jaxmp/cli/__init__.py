"""The command line: `python -m jaxmp` or `jaxmp`.

`doctor` looks at the machine, `policy` explains a policy, `report` compiles a step for
machines that are not there, `audit` finds what computes in the wrong dtype, and
`diagnose` finds what a policy does to the numbers of a loss.
"""

from jaxmp.cli._main import main

__all__ = ["main"]
