"""What computes in another dtype than it should, by line; nothing is compiled."""

import argparse
import json

from jaxmp.cli import _target
from jaxmp.cli._load import stay_on_cpu
from jaxmp.cli._output import Output
from jaxmp.errors import InvalidStep
from jaxmp.report import audit
from jaxmp.report.compile.progress import Progress

KINDS = ("accumulation", "upcast", "matmul", "collective", "alignment")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    _target.add_arguments(parser)
    parser.add_argument(
        "--policy",
        default="mixed_bfloat16",
        help="what the step is meant to compute in (%(default)s)",
    )
    parser.add_argument(
        "--as-written",
        action="store_true",
        help="look at a model as its author wrote it, not under jaxmp.autocast",
    )


def run(options: argparse.Namespace, progress: Progress) -> Output:
    """Audits the step."""
    stay_on_cpu()
    target = _target.load_target(options, progress)
    if options.as_written and not target.is_model:
        raise InvalidStep(
            "--as-written is for a model, which has --inputs; a step that a function "
            "returns is always looked at as it is."
        )
    given = target.takes_policy and not options.as_written
    step, *args = target.make(*(options.policy,) * given)
    progress.say("tracing the step and reading it")
    found = audit(step, *args, policy=options.policy)
    return Output(
        text=str(found),
        data=json.loads(found.to_json()),
        to_html=found.to_html,
        kinds=found.kinds,
    )
