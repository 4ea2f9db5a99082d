"""What a step costs on machines that are not there, under each policy.

XLA's own compilers for the H100 and for TPUs are run; nothing is executed. They come
with: pip install 'jaxmp[targets]'.
"""

import argparse

from jaxmp.cli import _target
from jaxmp.cli._load import stay_on_cpu
from jaxmp.cli._output import Output
from jaxmp.report import StepReport, compile_step, compile_step_of
from jaxmp.report.compile.progress import Progress
from jaxmp.report.compile.targets import read_target
from jaxmp.report.wire_findings import WIRE_KINDS

_TOO_LARGE, _UNREAD = "does-not-fit", "unread"
KINDS = (_TOO_LARGE, _UNREAD, *WIRE_KINDS)
_LOCAL = ("gpu", "tpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    _target.add_arguments(parser)
    parser.add_argument(
        "--target",
        action="append",
        help="such as h100, h100:8, tpu-v5e:16; may be repeated (h100 and tpu-v5e)",
    )
    parser.add_argument(
        "--policy",
        action="append",
        help="may be repeated (float32, mixed_bfloat16 and mixed_float16)",
    )
    parser.add_argument(
        "--donate",
        type=int,
        nargs="*",
        help="positions of arguments that the step may overwrite",
    )
    parser.add_argument("--png", metavar="FILE", help="write a bar chart, too")
    parser.add_argument("--no-cache", action="store_true", help="compile everything")


def run(options: argparse.Namespace, progress: Progress) -> Output:
    """Compiles the step."""
    chosen = options.target or ["h100", "tpu-v5e"]
    for target in chosen:
        read_target(target)
    if not any(target.partition(":")[0] in _LOCAL for target in chosen):
        stay_on_cpu()
    progress.hurry()
    report = _compile(options, chosen, progress)
    if options.png:
        report.to_png(options.png)
    kinds = {finding.kind for row in report.rows for finding in row.findings}
    if any(row.fits is False for row in report.rows):
        kinds.add(_TOO_LARGE)
    # Without its text a program has no findings, and nobody knows whether it should.
    if any(row.contents is None and not row.message for row in report.rows):
        kinds.add(_UNREAD)
    return Output(
        text=str(report),
        data=report.to_rows(),
        to_html=report.to_html,
        kinds=frozenset(kinds),
    )


def _compile(
    options: argparse.Namespace, chosen: list[str], progress: Progress
) -> StepReport:
    target = _target.load_target(options, progress)
    settings = {
        "policies": options.policy or ["float32", "mixed_bfloat16", "mixed_float16"],
        "targets": chosen,
        "donate_argnums": options.donate,
        "cache": not options.no_cache,
        "progress": progress.shown,
    }
    if target.takes_policy:
        return compile_step_of(target.make, **settings)
    return compile_step(*target.make(), **settings)
