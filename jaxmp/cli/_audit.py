"""What computes in another dtype than it should, by line; nothing is compiled."""

import argparse
import json

from jaxmp.cli._load import HELP, load_function, make_step, stay_on_cpu, takes_policy
from jaxmp.cli._output import Output
from jaxmp.report import audit

KINDS = ("accumulation", "upcast", "matmul", "collective", "alignment")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("step", help=HELP)
    parser.add_argument(
        "--policy",
        default="mixed_bfloat16",
        help="what the step is meant to compute in (%(default)s)",
    )


def run(options: argparse.Namespace) -> Output:
    """Audits the step."""
    stay_on_cpu()
    function = load_function(options.step)
    given = (options.policy,) if takes_policy(function) else ()
    step, *args = make_step(function, *given)
    found = audit(step, *args, policy=options.policy)
    return Output(
        text=str(found),
        data=json.loads(found.to_json()),
        to_html=found.to_html,
        kinds=found.kinds,
    )
